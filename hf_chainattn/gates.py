"""A learnable gamma: one parameter for each layer or head, in float32, saved with the weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

# name of the module in its attention module
GATE = "chain_gate"


class ChainGate(nn.Module):
    """Gamma as ``sigmoid(bias)``, ``[1]`` or ``[H]``.

    The parameter is called ``bias`` because Trainer does not decay what has this in its name. It stays float32
    whatever the model is cast to: in bfloat16 small updates of it would be lost.

    Args:
        start: Gamma to begin with, of the layer or of each head, inside ``(0, 1)``.
        device: Where the parameter is.
    """

    def __init__(self, start: Sequence[float], device: torch.device | None = None) -> None:
        super().__init__()
        self.start = tuple(start)
        self.bias = nn.Parameter(torch.empty(len(self.start), dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the gamma to begin with, unless the parameter was loaded from a checkpoint."""
        logits = torch.tensor(self.start, dtype=torch.float64, device="cpu").logit().to(self.bias)
        bias: Any = self.bias
        if hasattr(bias, "device_mesh"):
            # each process of fully sharded training has its part; all of them know the whole
            from torch.distributed.tensor import distribute_tensor

            logits = distribute_tensor(logits, bias.device_mesh, bias.placements, src_data_rank=None)
        # does nothing to a parameter that transformers has marked as loaded
        init.copy_(bias, logits)

    def forward(self) -> Tensor:
        """Return gamma, float32."""
        return torch.sigmoid(self.bias)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"start={self.start}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ANN401  as the parent
        def keeping_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_float32, recurse)


def gate_of(module: nn.Module) -> Any:  # noqa: ANN401  a gate, or what stands for one
    """Return the gate of an attention module, or ``None`` if it has none.

    Where PEFT trains a copy of the gate (``modules_to_save``), what it put in its place: called, it is the copy of the
    active adapter.
    """
    gate = module._modules.get(GATE)
    return gate if isinstance(original_of(gate), ChainGate) else None


def original_of(gate: Any) -> Any:  # noqa: ANN401  anything
    """Return the gate that PEFT trains a copy of, or the gate itself."""
    return getattr(gate, "original_module", gate)


def gates_of(model: nn.Module) -> list[ChainGate]:
    """Return all gates of a model, with PEFT the frozen ones and the copies of all adapters."""
    return [module for module in model.modules() if isinstance(module, ChainGate)]


def set_gate(module: nn.Module, start: Sequence[float] | None) -> None:
    """Give an attention module a gate that begins at ``start``, or with ``None`` take it away.

    A gate that began there already stays, whatever it has learned since.
    """
    gate = gate_of(module)
    if start is None and gate is not None:
        delattr(module, GATE)
    elif start is not None and (gate is None or original_of(gate).start != tuple(start)):
        setattr(module, GATE, ChainGate(start, _device_of(module)))


def _device_of(module: nn.Module) -> torch.device | None:
    """Return where a module computes, which is not where its parameters are while accelerate has them elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    device = next((found for hook in hooks if (found := getattr(hook, "execution_device", None)) is not None), None)
    parameter = next(module.parameters(), None)
    return parameter.device if device is None and parameter is not None else device


def keep_in_float32(model: PreTrainedModel) -> None:
    """Tell transformers not to load gates in the dtype of the model."""
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), GATE}


def gate_parameter_groups(
    model: nn.Module, *, learning_rate: float, gate_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, with a learning rate of their own for the gates.

    Args:
        model: With chain attention and ``learnable=True``.
        learning_rate: Of everything else.
        gate_lr: Of the gates.
        weight_decay: Of matrices; vectors, such as biases, norms and gates, are not decayed.

    Raises:
        ValueError: If the model has no gates that are trained.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from hf_chainattn import enable_chain_attention, gate_parameter_groups
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
        >>> model = enable_chain_attention(AutoModelForCausalLM.from_config(config), learnable=True)
        >>> groups = gate_parameter_groups(model, learning_rate=1e-3, gate_lr=1e-2, weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)  # Trainer(..., optimizers=(optimizer, None))
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gates = {id(gate.bias) for gate in gates_of(model) if gate.bias.requires_grad}
    if not gates:
        raise ValueError(
            "The model has no gates that are trained: switch it with enable_chain_attention(model, learnable=True), "
            f"and give PEFT modules_to_save=[{GATE!r}]."
        )
    others = [parameter for parameter in parameters if id(parameter) not in gates]
    groups: list[tuple[list[nn.Parameter], float, float]] = [
        ([parameter for parameter in others if parameter.ndim > 1], learning_rate, weight_decay),
        ([parameter for parameter in others if parameter.ndim <= 1], learning_rate, 0.0),
        ([parameter for parameter in parameters if id(parameter) in gates], gate_lr, 0.0),
    ]
    return [{"params": members, "lr": rate, "weight_decay": decay} for members, rate, decay in groups if members]
