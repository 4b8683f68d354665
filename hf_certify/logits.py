"""A model as a function of one tensor that returns logits, whatever it calls its input and returns besides."""

from torch import Tensor, nn


class LogitsModel(nn.Module):
    """Calls ``model`` with one tensor and returns the logits alone.

    A transformers model gets the tensor by the name of its main input, in its own dtype, and as ``inputs_embeds`` if
    that is ``input_ids``: no noise can be added to numbers of tokens. Any other module gets it by position, as it is.

    Args:
        model: Returns logits, or an object with ``logits``.

    Example:
        >>> import torch
        >>> LogitsModel(nn.Linear(2, 3).eval())(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # a new module is in training mode; the mode that counts is that of the model inside
        self.training = model.training
        main = getattr(model, "main_input_name", None)
        self.input_name = "inputs_embeds" if main == "input_ids" else main

    def forward(self, x: Tensor) -> object:
        """Return logits `[B, K]` of `[B, *shape]`; whatever else a model without ``logits`` returns, as it is."""
        if self.input_name is None:
            output = self.model(x)
        else:
            dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)
            output = self.model(**{self.input_name: x.to(dtype)})
        return getattr(output, "logits", output)
