"use strict";
// One self-contained page. Pictures are canvases: a base layer that is drawn once for a view, and an overlay for what
// is highlighted, so that moving the pointer over thousands of tensors redraws a few of them.
(() => {
  const graphs = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const COLOURS = dark
    ? ["#ced4da", "#37b24d", "#4dabf7", "#868e96", "#9775fa", "#fcc419", "#5c6772", "#ff8787", "#e599f7"]
    : ["#495057", "#40c057", "#339af0", "#adb5bd", "#845ef7", "#fab005", "#ced4da", "#fa5252", "#cc5de8"];
  const HOMES = [["kept", COLOURS[1]], ["offloaded", COLOURS[2]], ["recomputed", COLOURS[5]]];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const INK = css("--ink"), SOFT = css("--soft"), LINE = css("--line"), BAD = css("--bad"), CARD = css("--card");
  const LEFT = 64, BOTTOM = 18, TOP = 6, ROW = 26;

  const escape = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  function bytes(n) {
    for (const [unit, power] of [["TiB", 40], ["GiB", 30], ["MiB", 20], ["KiB", 10]]) {
      const size = 2 ** power;
      if (Math.abs(n) >= size) return `${(n / size).toFixed(n / size < 10 ? 2 : 1)} ${unit}`;
    }
    return `${Math.round(n)} B`;
  }
  function seconds(t) {
    if (t >= 1) return `${t.toFixed(2)} s`;
    return t >= 1e-3 ? `${(t * 1e3).toFixed(2)} ms` : `${(t * 1e6).toFixed(1)} µs`;
  }
  const short = (s) => s.replace(/^.*?\/(site|dist)-packages\//, "").replace(/^.*\/(?=[^/]+\/[^/]+\.py:)/, "");

  // State: the graph shown, what is highlighted, and the views.
  let data, pinned = null, hovered = null, pictures = [];
  let stepView = [0, 1], timeView = [0, 1];

  function unpack(timeline, strings) {
    const tensors = timeline.tensors.map((r, index) => ({
      index, key: strings[r[0]], name: strings[r[1]], cat: r[2], bytes: r[3], start: r[4], end: r[5], op: strings[r[6]],
      shape: strings[r[7]], layer: r[8], source: strings[r[9]], why: strings[r[10]], segment: r[11] || "",
      offset: r[12] || 0,
    }));
    const byKey = new Map();
    for (const t of tensors) byKey.set(t.key, [...(byKey.get(t.key) || []), t]);
    const total = new Float64Array(timeline.steps + 1);
    const change = data.categories.map(() => new Float64Array(timeline.steps + 1));
    for (const t of tensors) { change[t.cat][t.start] += t.bytes; change[t.cat][t.end] -= t.bytes; }
    for (const c of change) {
      for (let i = 1; i < c.length; i++) c[i] += c[i - 1];
      for (let i = 0; i < timeline.steps; i++) total[i] += c[i];
    }
    const outside = new Float64Array(timeline.steps);
    for (const t of tensors) if (!t.segment) for (let i = t.start; i < t.end; i++) outside[i] += t.bytes;
    const held = timeline.held && timeline.held.map((h, i) => h + outside[i]);
    let peak = 0;
    for (let i = 0; i < timeline.steps; i++) if ((held || total)[i] > (held || total)[peak]) peak = i;
    const inOrder = data.categories.map((_, c) => tensors.filter((t) => t.cat === c).sort((a, b) => a.start - b.start || b.end - a.end));
    const labels = timeline.labels.map((i) => strings[i]);
    return { ...timeline, tensors, byKey, total, levels: change, held, peak, inOrder, labels };
  }

  // Steps are drawn so that the forward takes the same share of every picture.
  function toUnit(timeline, step) {
    const share = data.after.forward / data.after.steps, f = timeline.forward;
    return step <= f ? (f ? step / f : 0) * share : share + ((step - f) / (timeline.steps - f || 1)) * (1 - share);
  }
  function toStep(timeline, unit) {
    const share = data.after.forward / data.after.steps, f = timeline.forward;
    const step = unit <= share ? (unit / share) * f : f + ((unit - share) / (1 - share)) * (timeline.steps - f);
    return Math.max(0, Math.min(timeline.steps - 1, Math.floor(step)));
  }

  class Picture {
    constructor(id, view) {
      this.box = $(id); this.box.textContent = ""; this.view = view; this.highlighted = 0;
      this.base = this.box.appendChild(document.createElement("canvas"));
      this.over = this.box.appendChild(document.createElement("canvas"));
      this.box.onmousemove = (e) => this.moved(e);
      this.box.onmouseleave = () => { hover(null); hideTip(); this.drag = null; };
      this.box.onmousedown = (e) => { this.drag = e.offsetX; };
      this.box.onmouseup = (e) => this.released(e);
      this.box.ondblclick = () => { this.view[0] = 0; this.view[1] = 1; redraw(this.view); };
      this.box.onwheel = (e) => { e.preventDefault(); this.zoom(e.offsetX, e.deltaY > 0 ? 1.25 : 0.8); };
    }
    size() {
      const ratio = devicePixelRatio || 1;
      this.w = this.box.clientWidth; this.h = this.box.clientHeight;
      for (const canvas of [this.base, this.over]) {
        canvas.width = this.w * ratio; canvas.height = this.h * ratio;
        canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
      }
    }
    x(unit) { return LEFT + ((unit - this.view[0]) / (this.view[1] - this.view[0])) * (this.w - LEFT - 6); }
    unit(x) { return this.view[0] + ((x - LEFT) / (this.w - LEFT - 6)) * (this.view[1] - this.view[0]); }
    y(value) { return TOP + (1 - value / this.top) * (this.h - TOP - BOTTOM); }
    value(y) { return (1 - (y - TOP) / (this.h - TOP - BOTTOM)) * this.top; }
    zoom(x, factor) {
      const at = this.unit(x), wide = Math.min(1, Math.max(1e-4, (this.view[1] - this.view[0]) * factor));
      const share = (at - this.view[0]) / (this.view[1] - this.view[0]);
      this.view[0] = Math.max(0, Math.min(1 - wide, at - share * wide)); this.view[1] = this.view[0] + wide;
      redraw(this.view);
    }
    moved(e) {
      if (this.drag != null && Math.abs(e.offsetX - this.drag) > 4) {
        this.highlight(); const c = this.over.getContext("2d");
        c.fillStyle = SOFT; c.globalAlpha = 0.25; c.fillRect(Math.min(this.drag, e.offsetX), TOP, Math.abs(e.offsetX - this.drag), this.h - TOP - BOTTOM);
        c.globalAlpha = 1; return;
      }
      const found = e.offsetX >= LEFT ? this.hit(e.offsetX, e.offsetY) : null;
      hover(found ? found.key : null);
      const text = found && found.text ? found.text : this.about(e.offsetX);
      text ? showTip(text, e.clientX, e.clientY) : hideTip();
    }
    released(e) {
      const from = this.drag; this.drag = null;
      if (from != null && Math.abs(e.offsetX - from) > 4) {
        const [a, b] = [this.unit(Math.min(from, e.offsetX)), this.unit(Math.max(from, e.offsetX))];
        this.view[0] = Math.max(0, a); this.view[1] = Math.min(1, Math.max(b, a + 1e-4)); redraw(this.view); return;
      }
      const found = this.hit(e.offsetX, e.offsetY);
      pin(found ? found.key : null);
    }
    about() { return ""; }
    start() {
      this.size(); const c = this.base.getContext("2d"); c.clearRect(0, 0, this.w, this.h);
      c.font = "11px system-ui, sans-serif"; return c;
    }
    clip(c) { c.save(); c.beginPath(); c.rect(LEFT, 0, this.w - LEFT - 6, this.h - BOTTOM + 1); c.clip(); }
    axis(c) {
      c.fillStyle = SOFT; c.strokeStyle = LINE; c.textAlign = "right"; c.textBaseline = "middle";
      const step = 2 ** Math.floor(Math.log2(this.top / 3));
      for (let v = 0; v <= this.top; v += step) {
        const y = Math.round(this.y(v)) + 0.5;
        c.beginPath(); c.moveTo(LEFT, y); c.lineTo(this.w - 6, y); c.stroke(); c.fillText(bytes(v), LEFT - 6, y);
      }
    }
    border(c, timeline) {
      const x = Math.round(this.x(toUnit(timeline, timeline.forward))) + 0.5;
      c.textBaseline = "alphabetic"; c.fillStyle = SOFT;
      if (x > LEFT && x < this.w) {
        c.strokeStyle = SOFT; c.setLineDash([2, 3]); c.beginPath(); c.moveTo(x, TOP); c.lineTo(x, this.h - BOTTOM); c.stroke(); c.setLineDash([]);
        c.textAlign = "right"; if (x > LEFT + 60) c.fillText("forward", x - 6, this.h - 4);
        c.textAlign = "left"; if (x < this.w - 80) c.fillText("backward", x + 6, this.h - 4);
      } else { c.textAlign = "left"; c.fillText(x <= LEFT ? "backward" : "forward", LEFT + 4, this.h - 4); }
      c.textAlign = "left"; c.fillText(`step ${toStep(timeline, this.view[0])}`, 6, this.h - 4);
    }
    overlay() { const c = this.over.getContext("2d"); c.clearRect(0, 0, this.w, this.h); return c; }
    marked(n) { this.highlighted = n; this.box.dataset.highlighted = n; this.box.dataset.key = shown() || ""; }
  }

  class Memory extends Picture {
    constructor(id, timeline) { super(id, stepView); this.t = timeline; }
    draw() {
      const c = this.start(), t = this.t;
      this.top = 1.06 * Math.max(data.before.total[data.before.peak], (data.after.held || data.after.total)[data.after.peak], data.plan.budget || 0, 1);
      this.axis(c); this.clip(c);
      const from = toStep(t, this.view[0]), to = Math.min(t.steps - 1, toStep(t, this.view[1]) + 1);
      const base = new Float64Array(t.steps);
      t.levels.forEach((level, cat) => {
        c.fillStyle = COLOURS[cat]; c.beginPath();
        for (let i = from; i <= to; i++) { const y = this.y(base[i] + level[i]); c.lineTo(this.x(toUnit(t, i)), y); c.lineTo(this.x(toUnit(t, i + 1)), y); }
        for (let i = to; i >= from; i--) { const y = this.y(base[i]); c.lineTo(this.x(toUnit(t, i + 1)), y); c.lineTo(this.x(toUnit(t, i)), y); }
        c.fill();
        for (let i = from; i <= to; i++) base[i] += level[i];
      });
      if (t.held) this.outline(c, t.held, from, to);
      c.restore();
      if (data.plan.budget) this.rule(c, data.plan.budget, `budget ${bytes(data.plan.budget)}`, BAD, true);
      const peak = (t.held || t.total)[t.peak];
      this.rule(c, peak, `peak ${bytes(peak)}`, INK, false);
      this.border(c, t); this.highlight();
    }
    outline(c, held, from, to) {
      c.strokeStyle = INK; c.lineWidth = 1; c.beginPath();
      for (let i = from; i <= to; i++) { c.lineTo(this.x(toUnit(this.t, i)), this.y(held[i])); c.lineTo(this.x(toUnit(this.t, i + 1)), this.y(held[i])); }
      c.stroke();
    }
    rule(c, value, text, colour, left) {
      const y = Math.round(this.y(value)) + 0.5;
      c.strokeStyle = colour; c.setLineDash([6, 4]); c.beginPath(); c.moveTo(LEFT, y); c.lineTo(this.w - 6, y); c.stroke(); c.setLineDash([]);
      const x = left ? LEFT + 6 : this.w - 12;
      c.textAlign = left ? "left" : "right"; c.textBaseline = "bottom"; const wide = c.measureText(text).width;
      c.globalAlpha = 0.8; c.fillStyle = CARD; c.fillRect(left ? x - 2 : x - wide - 2, y - 15, wide + 4, 14); c.globalAlpha = 1;
      c.fillStyle = colour; c.fillText(text, x, y - 2);
    }
    hit(x, y) {
      const step = toStep(this.t, this.unit(x)), value = this.value(y);
      if (value < 0 || value > this.t.total[step]) return null;
      let sum = 0;
      for (let cat = 0; cat < this.t.levels.length; cat++) {
        const level = this.t.levels[cat][step];
        if (value > sum + level) { sum += level; continue; }
        for (const t of this.t.inOrder[cat]) if (t.start <= step && step < t.end && (sum += t.bytes) >= value) return { key: t.key, text: about(t) };
      }
      return null;
    }
    about(x) {
      if (x < LEFT) return "";
      const step = toStep(this.t, this.unit(x));
      const live = this.t.tensors.filter((t) => t.start <= step && step < t.end).sort((a, b) => b.bytes - a.bytes).slice(0, 6);
      const rows = live.map((t) => `<div>${swatch(t.cat)}${escape(t.name)} <span class=soft>${bytes(t.bytes)}</span></div>`).join("");
      const held = this.t.held ? `, held ${bytes(this.t.held[step])}` : "";
      return `<b>step ${step}</b> <span class=soft>${escape(this.t.labels[step] || "")}</span><div>live ${bytes(this.t.total[step])}${held}</div>${rows}`;
    }
    place(t) {
      const below = new Float64Array(t.end - t.start);
      for (let cat = 0; cat < t.cat; cat++) for (let i = t.start; i < t.end; i++) below[i - t.start] += this.t.levels[cat][i];
      const edge = new Float64Array(t.end - t.start + 1);
      for (const o of this.t.inOrder[t.cat]) {
        if (o === t) break;
        const a = Math.max(o.start, t.start), b = Math.min(o.end, t.end);
        if (a < b) { edge[a - t.start] += o.bytes; edge[b - t.start] -= o.bytes; }
      }
      for (let i = 0, sum = 0; i < below.length; i++) below[i] += sum += edge[i];
      return below;
    }
    highlight() {
      const c = this.overlay(), found = this.t.byKey.get(shown()) || [];
      this.clip(c);
      for (const t of found) {
        const below = this.place(t);
        c.fillStyle = INK; c.globalAlpha = 0.08; const [a, b] = [this.x(toUnit(this.t, t.start)), this.x(toUnit(this.t, t.end))];
        c.fillRect(a, TOP, Math.max(1.5, b - a), this.h - TOP - BOTTOM); c.globalAlpha = 1;
        c.beginPath();
        for (let i = t.start; i < t.end; i++) { const y = this.y(below[i - t.start] + t.bytes); c.lineTo(this.x(toUnit(this.t, i)), y); c.lineTo(this.x(toUnit(this.t, i + 1)), y); }
        for (let i = t.end - 1; i >= t.start; i--) { const y = this.y(below[i - t.start]); c.lineTo(this.x(toUnit(this.t, i + 1)), y); c.lineTo(this.x(toUnit(this.t, i)), y); }
        c.closePath(); c.fillStyle = INK; c.globalAlpha = 0.9; c.fill(); c.globalAlpha = 1; c.strokeStyle = INK; c.lineWidth = 1.5; c.stroke();
      }
      c.restore(); this.marked(found.length);
    }
    where(key) {
      const t = (this.t.byKey.get(key) || [])[0]; if (!t) return null;
      const step = Math.floor((t.start + t.end) / 2), below = this.place(t)[step - t.start];
      return [this.x(toUnit(this.t, step + 0.5)), this.y(below + t.bytes / 2)];
    }
  }

  class Arena extends Picture {
    constructor(id) {
      super(id, stepView); this.t = data.after; this.bases = new Map(data.segments.map((s) => [s[0], s[1]]));
      this.top = Math.max(1, ...data.segments.map((s) => s[1] + s[2]));
      this.placed = this.t.tensors.filter((t) => t.segment).map((t) => ({ ...t, address: this.bases.get(t.segment) + t.offset }));
      this.byKey = new Map(); for (const t of this.placed) this.byKey.set(t.key, [...(this.byKey.get(t.key) || []), t]);
    }
    rect(t) {
      const a = this.x(toUnit(this.t, t.start)), b = this.x(toUnit(this.t, t.end)), y = this.y(t.address + t.bytes);
      return [a, y, Math.max(0.7, b - a), Math.max(0.7, this.y(t.address) - y)];
    }
    draw() {
      const c = this.start(); this.axis(c); this.clip(c);
      c.globalAlpha = dark ? 0.25 : 0.5; c.fillStyle = LINE;
      for (const [, base, size, start, end] of data.segments) c.fillRect(...this.rect({ address: base, bytes: size, start, end }));
      c.globalAlpha = 1;
      for (const t of this.placed) {
        const r = this.rect(t); c.fillStyle = COLOURS[t.cat]; c.fillRect(...r);
        if (r[2] > 3 && r[3] > 3) { c.strokeStyle = CARD; c.lineWidth = 0.5; c.strokeRect(...r); }
        if (r[2] > 70 && r[3] > 12) { c.fillStyle = "#000"; c.textAlign = "left"; c.textBaseline = "middle"; c.save(); c.beginPath(); c.rect(...r); c.clip(); c.fillText(t.name, Math.max(r[0], LEFT) + 4, r[1] + r[3] / 2); c.restore(); }
      }
      c.strokeStyle = SOFT; c.lineWidth = 0.6;
      for (const [, base, size, start, end] of data.segments) c.strokeRect(...this.rect({ address: base, bytes: size, start, end }));
      c.restore(); this.border(c, this.t); this.highlight();
    }
    hit(x, y) {
      for (let i = this.placed.length - 1; i >= 0; i--) {
        const t = this.placed[i], r = this.rect(t);
        if (x >= r[0] && x <= r[0] + r[2] && y >= r[1] && y <= r[1] + r[3]) return { key: t.key, text: about(t) };
      }
      return null;
    }
    highlight() {
      const c = this.overlay(), found = this.byKey.get(shown()) || [];
      this.clip(c);
      for (const t of found) { const r = this.rect(t); c.fillStyle = INK; c.globalAlpha = 0.85; c.fillRect(...r); c.globalAlpha = 1; c.strokeStyle = INK; c.lineWidth = 1.5; c.strokeRect(...r); }
      c.restore(); this.marked(found.length);
    }
    where(key) { const t = (this.byKey.get(key) || [])[0]; if (!t) return null; const r = this.rect(t); return [r[0] + r[2] / 2, r[1] + r[3] / 2]; }
  }

  class Streams extends Picture {
    constructor(id) {
      super(id, timeView); this.s = data.streams; this.lanes = ["compute", "d2h", "h2d"]; this.titles = ["compute", "to host", "from host"];
      this.lane = [[], [], []]; this.byKey = new Map();
      for (const [stream, key, start, end, size] of this.s.events) {
        const e = { lane: this.lanes.indexOf(stream), key, start, end, bytes: size };
        this.lane[e.lane].push(e); this.byKey.set(key, [...(this.byKey.get(key) || []), e]);
      }
      this.stalls = []; let last = 0;
      for (const e of this.lane[0]) { if (e.start - last > 1e-9 * this.s.seconds) this.stalls.push([last, e.start]); last = Math.max(last, e.end); }
      if (this.s.seconds - last > 1e-9 * this.s.seconds) this.stalls.push([last, this.s.seconds]);
    }
    rect(lane, start, end) {
      const tall = (this.h - TOP - BOTTOM) / 3, a = this.x(start / this.s.seconds), b = this.x(end / this.s.seconds);
      return [a, TOP + lane * tall + 4, Math.max(0.6, b - a), tall - 8];
    }
    draw() {
      const c = this.start(); c.fillStyle = SOFT; c.textAlign = "right"; c.textBaseline = "middle";
      this.titles.forEach((title, i) => c.fillText(title, LEFT - 6, TOP + ((i + 0.5) * (this.h - TOP - BOTTOM)) / 3));
      this.clip(c);
      c.fillStyle = BAD; c.globalAlpha = 0.3; for (const [a, b] of this.stalls) c.fillRect(...this.rect(0, a, b)); c.globalAlpha = 1;
      this.lane.forEach((events, lane) => events.forEach((e, i) => {
        c.fillStyle = lane === 0 ? (e.key === "recompute" ? COLOURS[5] : COLOURS[3]) : lane === 1 ? COLOURS[2] : COLOURS[4];
        c.globalAlpha = i % 2 ? 0.75 : 1; c.fillRect(...this.rect(lane, e.start, e.end));
      }));
      c.globalAlpha = 1; c.restore(); c.fillStyle = SOFT; c.textBaseline = "alphabetic"; c.textAlign = "left";
      c.fillText(seconds(this.view[0] * this.s.seconds), LEFT, this.h - 4); c.textAlign = "right"; c.fillText(seconds(this.view[1] * this.s.seconds), this.w - 6, this.h - 4);
      this.highlight();
    }
    hit(x, y) {
      const lane = Math.floor(((y - TOP) / (this.h - TOP - BOTTOM)) * 3), at = this.unit(x) * this.s.seconds;
      const slack = (1.5 / (this.w - LEFT)) * (this.view[1] - this.view[0]) * this.s.seconds;
      const away = (e) => Math.max(e.start - at, at - e.end, 0);
      let e = null;
      for (const o of this.lane[lane] || []) if (away(o) <= slack && (!e || away(o) < away(e))) e = o;
      if (e) {
        const rate = e.bytes ? `, ${bytes(e.bytes)}, ${bytes(e.bytes / (e.end - e.start))}/s` : "";
        return { key: e.key, text: `<b>${escape(e.key)}</b> <span class=soft>${this.titles[lane]}</span><div>${seconds(e.end - e.start)} from ${seconds(e.start)}${rate}</div>${aboutKey(e.key)}` };
      }
      const stall = lane === 0 && this.stalls.find(([a, b]) => a <= at && at <= b);
      return stall ? { key: null, text: `<b>stall</b> ${seconds(stall[1] - stall[0])}` } : null;
    }
    highlight() {
      const c = this.overlay(), found = this.byKey.get(shown()) || [];
      this.clip(c); c.fillStyle = INK;
      for (const e of found) { const r = this.rect(e.lane, e.start, e.end); r[2] = Math.max(2, r[2]); c.fillRect(...r); }
      c.restore(); this.marked(found.length);
    }
    where(key) { const e = (this.byKey.get(key) || [])[0]; if (!e) return null; const r = this.rect(e.lane, e.start, e.end); return [r[0] + r[2] / 2, r[1] + r[3] / 2]; }
  }

  const swatch = (cat) => `<i class=swatch style="background:${COLOURS[cat]}"></i>`;
  function homesBar(tokens, counts) {
    return `<div class=bar>${counts.map((n, i) => (n ? `<i style="width:${(100 * n) / tokens}%;background:${HOMES[i][1]}"></i>` : "")).join("")}</div>`;
  }
  function aboutKey(key) {
    const a = data.saved.get(key);
    if (!a) return "";
    const share = HOMES.map(([name], i) => `${name} ${Math.round((100 * a.homes[i]) / a.tokens)} %`).join(", ");
    return `<div>saved: ${share}</div>${homesBar(a.tokens, a.homes)}<div class=soft>${escape(a.reason)}</div><code>${escape(short(a.source))}</code>`;
  }
  function about(t) {
    const where = t.segment ? `<div class=soft>${escape(t.segment)} + ${t.offset.toLocaleString()}</div>` : "";
    const layer = t.layer == null ? "" : `, layer ${t.layer}`;
    const extra = aboutKey(t.key);
    return `<b>${swatch(t.cat)}${escape(t.name)}</b> ${bytes(t.bytes)}<div class=soft>${escape(t.op)} ${escape(t.shape)}</div>` +
      `<div>${data.categories[t.cat]}, steps ${t.start} to ${t.end}${layer}</div>${where}` +
      (t.why ? `<div class=why>${escape(t.why)}</div>` : "") + (extra || `<code>${escape(short(t.source))}</code>`);
  }
  function showTip(text, x, y) {
    const tip = $("tip"); tip.innerHTML = text; tip.hidden = false;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = `${x + 16 + w > innerWidth ? Math.max(4, x - 16 - w) : x + 16}px`;
    tip.style.top = `${y + 16 + h > innerHeight ? Math.max(4, y - 12 - h) : y + 16}px`;
  }
  function hideTip() { $("tip").hidden = true; }

  const shown = () => hovered ?? pinned;
  function hover(key) { if (hovered === key) return; hovered = key; light(); }
  function pin(key) { pinned = pinned === key ? null : key; hovered = null; light(); if (pinned) table.reveal(pinned); }
  function light() { for (const p of pictures) p.highlight(); table.light(); }
  function redraw(view) { for (const p of pictures) if (!view || p.view === view) p.draw(); }

  // Tables: only the rows in sight are in the page.
  const number = (text) => ({ text, n: true });
  const TABLES = {
    tensors: {
      columns: [["tensor", "1.3fr"], ["kind", "1fr"], ["bytes", "90px", true], ["steps", "110px", true], ["layer", "50px", true], ["op", "1.3fr"], ["shape", "1.2fr"], ["source", "3fr"]],
      rows: () => data.after.tensors.map((t) => ({
        key: t.key, sort: [t.name, t.cat, t.bytes, t.start, t.layer ?? -1, t.op, t.shape, t.source],
        html: () => [swatch(t.cat) + escape(t.name), data.categories[t.cat], bytes(t.bytes), `${t.start}–${t.end}`, t.layer ?? "", escape(t.op), escape(t.shape), `<code>${escape(short(t.source))}</code>`],
      })),
    },
    activations: {
      columns: [["value", "1fr"], ["shape", "1.2fr"], ["bytes", "90px", true], ["layer", "50px", true], ["homes", "120px"], ["kept", "60px", true], ["offl.", "60px", true], ["recomp.", "70px", true], ["note", "1.4fr"], ["source", "2.4fr"]],
      rows: () => [...data.saved.values()].map((a) => ({
        key: a.name, sort: [a.name, a.shape, a.bytes, a.layer ?? -1, a.homes[0] / a.tokens, ...a.homes.map((h) => h / a.tokens), a.reason, a.source],
        html: () => [escape(a.name), escape(a.shape), bytes(a.bytes), a.layer ?? "", homesBar(a.tokens, a.homes), ...a.homes.map((h) => (h ? `${Math.round((100 * h) / a.tokens)} %` : "")), escape(a.reason), `<code>${escape(short(a.source))}</code>`],
      })),
    },
    layers: {
      columns: [["layer", "90px"], ["class", "70px", true], ["saved", "100px", true], ["homes", "1fr"], ["kept", "100px", true], ["offloaded", "100px", true], ["recomputed", "100px", true], ["transients", "110px", true]],
      rows: () => {
        const rows = new Map([...data.layers.keys(), "outside"].map((l) => [l, { saved: 0, homes: [0, 0, 0], transient: 0 }]));
        for (const a of data.saved.values()) { const r = rows.get(a.layer ?? "outside"); r.saved += a.bytes; a.homes.forEach((h, i) => (r.homes[i] += (a.bytes * h) / a.tokens)); }
        for (const t of data.after.tensors) if (/transient/.test(data.categories[t.cat])) { const r = rows.get(t.layer ?? "outside"); if (r) r.transient = Math.max(r.transient, t.bytes); }
        return [...rows].map(([l, r]) => ({
          key: null, sort: [l === "outside" ? 1e9 : l, l === "outside" ? 1e9 : data.layers[l], r.saved, r.homes[0] / (r.saved || 1), ...r.homes, r.transient],
          html: () => [l, data.layers[l] ?? "", bytes(r.saved), homesBar(r.saved || 1, r.homes), ...r.homes.map((h) => (h ? bytes(h) : "")), bytes(r.transient)],
        }));
      },
    },
    workspaces: {
      columns: [["node", "1fr"], ["op", "1fr"], ["bytes", "6em"], ["known", "1fr"], ["source", "3fr"]],
      rows: () => (data.plan.workspaces ?? []).map((w) => ({ key: w.node, sort: [w.node, w.op, w.bytes, w.how, w.source], html: () => [escape(w.node), escape(w.op), bytes(w.bytes), escape(w.how), `<code>${escape(short(w.source))}</code>`] })),
    },
    stops: {
      columns: [["node", "1fr"], ["op", "1fr"], ["why", "2fr"], ["source", "3fr"]],
      rows: () => data.plan.stops.map((s) => ({ key: s.node, sort: [s.node, s.op, s.reason, s.source], html: () => [escape(s.node), escape(s.op), escape(s.reason), `<code>${escape(short(s.source))}</code>`] })),
    },
  };
  const table = {
    name: "tensors", column: 2, down: true, rows: [], all: [],
    open(name) {
      this.name = name; const t = TABLES[name];
      if (name !== "tensors" || this.column >= t.columns.length) { this.column = name === "layers" ? 0 : name === "stops" ? 0 : 2; this.down = name === "activations"; }
      this.all = t.rows(); for (const r of this.all) r.text = r.sort.join(" ").toLowerCase();
      document.querySelectorAll("#tables nav button").forEach((b) => b.classList.toggle("on", b.dataset.table === name));
      this.arrange();
    },
    arrange() {
      const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), at = this.column, sign = this.down ? -1 : 1;
      this.rows = this.all.filter((r) => words.every((w) => r.text.includes(w)));
      this.rows.sort((a, b) => sign * (typeof a.sort[at] === "number" && typeof b.sort[at] === "number" ? a.sort[at] - b.sort[at] : String(a.sort[at]).localeCompare(String(b.sort[at]))));
      const t = TABLES[this.name], grid = t.columns.map((c) => c[1]).join(" ");
      $("head").style.gridTemplateColumns = grid; $("rows").style.setProperty("--grid", grid);
      $("head").innerHTML = t.columns.map(([title, , n], i) => `<span class="${n ? "n" : ""}" data-column=${i}>${title}${i === at ? (this.down ? " ▾" : " ▴") : ""}</span>`).join("");
      $("rows").style.height = `${this.rows.length * ROW}px`; $("count").textContent = `${this.rows.length} of ${this.all.length}`;
      $("body").scrollTop = 0; this.draw();
    },
    draw() {
      const first = Math.max(0, Math.floor($("body").scrollTop / ROW) - 4), last = Math.min(this.rows.length, first + Math.ceil($("body").clientHeight / ROW) + 8);
      const t = TABLES[this.name], grid = t.columns.map((c) => c[1]).join(" "); let out = "";
      for (let i = first; i < last; i++) {
        const r = this.rows[i], cells = r.html();
        out += `<div class="row${r.key && r.key === shown() ? " lit" : ""}" data-i=${i} style="top:${i * ROW}px;grid-template-columns:${grid}">${cells.map((v, j) => `<span class="${t.columns[j][2] ? "n" : ""}">${v}</span>`).join("")}</div>`;
      }
      $("rows").innerHTML = out;
    },
    light() { document.querySelectorAll("#rows .row").forEach((e) => { const r = this.rows[e.dataset.i]; e.classList.toggle("lit", Boolean(r && r.key && r.key === shown())); }); },
    reveal(key) { const i = this.rows.findIndex((r) => r.key === key); if (i >= 0) { $("body").scrollTop = Math.max(0, i * ROW - 120); this.draw(); } },
  };
  $("body").onscroll = () => table.draw();
  $("rows").onmousemove = (e) => { const row = e.target.closest(".row"); hover(row ? table.rows[row.dataset.i].key : null); };
  $("rows").onmouseleave = () => hover(null);
  $("rows").onclick = (e) => { const row = e.target.closest(".row"); if (row) { pinned = table.rows[row.dataset.i].key; light(); } };
  $("head").onclick = (e) => {
    const c = e.target.dataset.column; if (c === undefined) return;
    table.down = table.column === Number(c) ? !table.down : Boolean(TABLES[table.name].columns[c][2]); table.column = Number(c); table.arrange();
  };
  $("filter").oninput = () => table.arrange();
  document.querySelectorAll("#tables nav button").forEach((b) => (b.onclick = () => table.open(b.dataset.table)));
  $("find").oninput = () => {
    const text = $("find").value.toLowerCase();
    const t = text && (data.after.tensors.find((t) => t.name.toLowerCase() === text) || data.after.tensors.find((t) => `${t.name} ${t.op} ${t.source}`.toLowerCase().includes(text)));
    pinned = t ? t.key : null; hovered = null; light(); if (t) table.reveal(t.key);
  };
  addEventListener("keydown", (e) => { if (e.key === "Escape") { pinned = hovered = null; $("find").value = ""; light(); hideTip(); } });
  let resizing; addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => redraw(), 60); });

  function cards() {
    const p = data.plan, after = (data.after.held || data.after.total)[data.after.peak], before = data.before.total[data.before.peak];
    const card = (title, value, note) => `<div class=card><span>${title}</span><b>${value}</b><i>${note}</i></div>`;
    const ratio = p.lower_bound ? `${(p.arena_bytes / p.lower_bound).toFixed(3)} × its lower bound` : "no arena: op by op";
    const t = data.totals, saved = t.kept + t.offloaded + t.recomputed || 1, percent = (n) => `${Math.round((100 * n) / saved)} % of what is saved`;
    $("cards").innerHTML = [
      card("planned peak", bytes(p.predicted_peak), `${bytes(p.unplanned_peak)} unplanned`),
      card("budget", p.budget ? bytes(p.budget) : "none", p.budget ? `${((100 * p.predicted_peak) / p.budget).toFixed(1)} % used` : ""),
      card("arena", bytes(p.arena_bytes), ratio),
      card("kept", bytes(t.kept), percent(t.kept)), card("offloaded", bytes(t.offloaded), percent(t.offloaded)),
      card("recomputed", bytes(t.recomputed), `${(p.forward_flops ? (100 * p.recomputed_flops) / p.forward_flops : 0).toFixed(1)} % of the forward's FLOPs`),
      card("step, predicted", seconds(p.predicted_seconds), `${data.calibrated ? "" : "not calibrated: a built-in profile’s rates · "}binding: ${escape(p.binding)}`),
      card("planned in", `${p.seconds.toFixed(1)} s`, escape(p.solver)),
    ].join("");
    $("before-note").textContent = `as torch would split the graph, modelled: ${bytes(before)} at its peak, ${data.before.tensors.length} tensors`;
    $("after-note").textContent = `${data.after.emitted ? "as emitted" : "op by op"}: ${bytes(after)} at its peak, ${data.after.tensors.length} tensors${data.after.held ? "; the line is what the segments hold" : ""}`;
    $("legend").innerHTML = data.categories.map((c, i) => `<span><i style="background:${COLOURS[i]}"></i>${c}</span>`).join("");
  }

  function open(index) {
    data = graphs[index]; pinned = hovered = null; stepView = [0, 1]; timeView = [0, 1];
    if (!data.saved) {
      const s = data.strings; data.before = unpack(data.before, s); data.after = unpack(data.after, s);
      data.saved = new Map(data.activations.map((a) => [s[a[0]], { name: s[a[0]], shape: s[a[1]], bytes: a[2], tokens: a[3], homes: [a[4], a[5], a[6]], layer: a[7], source: s[a[8]], reason: s[a[9]] }]));
    }
    $("name").textContent = `${data.plan.name}, ${data.plan.backend}`; document.title = `memo: ${data.plan.name}`; cards();
    pictures = [new Memory("before", data.before), new Memory("after", data.after)];
    $("arena-figure").hidden = !data.segments.length; if (data.segments.length) pictures.push(new Arena("arena"));
    $("arena-note").textContent = data.segments.length ? `${data.segments.length} segments, ${data.after.tensors.filter((t) => t.segment).length} buffers` : "";
    $("streams-figure").hidden = !data.streams;
    if (data.streams) {
      pictures.push(new Streams("streams")); const s = data.streams;
      const stalls = Object.entries(s.stalls).filter(([, v]) => v > 0).map(([k, v]) => `${seconds(v)} waiting for ${k}`).join(", ") || "none";
      $("streams-note").textContent = `${seconds(s.seconds)} a step; stalls: ${stalls}; ${Math.round(100 * s.overlap)} % of the copying is behind compute`;
    }
    redraw(); table.open("tensors");
  }
  $("graph").innerHTML = graphs.map((g, i) => `<option value=${i}>${escape(g.plan.name)}</option>`).join("");
  $("graph").hidden = graphs.length < 2; $("graph").onchange = () => open(Number($("graph").value));
  open(0);
  // For tests: where a tensor is drawn, in pixels of its picture.
  window.memoReport = { ready: performance.now(), where: (id, key) => pictures.find((p) => p.box.id === id)?.where(key) ?? null, keys: () => [...data.saved.keys()] };
})();
