"""memo: a torch.compile backend that trains models whose activations do not fit on the device."""

__version__ = "0.1.0"
