"""The keys under which passes leave what they found in `node.meta`, for other passes and for reports."""

TOKENS = "memo_tokens"  # TokenInfo: the token axis of the value
LAYER = "memo_layer"  # LayerInfo: the repeated layer that the node stands in
WHY = "memo_why"  # why a pass inserted the node, in words
FOR = "memo_for"  # the name of the saved activation that the node serves
PART_OF = "memo_part_of"  # the name of the saved activation of which the value is the kept rows
