"""The contrastive step: forward, loss and backward of a batch of any size in bounded memory (GradCache, 2101.06983)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .objective import ContrastiveObjective


if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepOutput:
    """What a step reports; everything detached and on the device, so that nothing waits for it."""

    loss: Tensor  # [], mean over the queries of this process
    statistics: dict[str, Tensor]  # 0-d tensors: accuracy, mrr, positive_similarity, ...


class ContrastiveStep:
    """Forward and backward of one contrastive batch.

    Args:
        model: the [`~hf_e5.E5Model`], as the accelerator prepared it (bare, DDP or DeepSpeed engine).
        args: [`~hf_e5.E5TrainingArguments`].
        accelerator: runs backward, and so owns loss scaling, gradient synchronisation and ZeRO.
    """

    def __init__(self, model: nn.Module, args: Any, accelerator: Accelerator):
        self.model, self.args, self.accelerator = model, args, accelerator
        self.objective = ContrastiveObjective(
            temperature=args.temperature,
            gather_across_devices=args.gather_across_devices,
            mask_duplicates=args.mask_duplicates,
            false_negative_margin=args.false_negative_margin,
            matryoshka_dims=args.matryoshka_dims,
        )

    def __call__(self, batch: dict[str, Tensor], *, loss_scale: float = 1.0) -> StepOutput:
        """Add the gradients of `loss_scale` x loss to the parameters.

        Args:
            batch: of [`~hf_e5.E5DataCollator`], on the model's device.
            loss_scale: 1 / gradient accumulation steps. The reported loss is not scaled.
        """
        embeddings = self._embed(batch)
        output = self.objective(embeddings.detach(), batch)
        surrogate = (embeddings * (output.grad * loss_scale)).sum()
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == "DEEPSPEED" else {}
        self.accelerator.backward(surrogate, **options)
        return StepOutput(output.loss, output.statistics)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> StepOutput:
        """Loss and statistics of a batch, without backward."""
        output = self.objective(self._embed(batch), batch)
        return StepOutput(output.loss, output.statistics)

    def _embed(self, batch: dict[str, Tensor]) -> Tensor:
        lengths = batch["lengths"]
        attention_mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        input_ids = torch.zeros_like(attention_mask, dtype=torch.int64)
        input_ids[attention_mask] = batch["input_ids"]
        return self.model(input_ids, attention_mask.long())
