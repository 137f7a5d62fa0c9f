"""The contrastive step: forward, loss and backward of a batch of any size in bounded memory.

GradCache (Gao et al., 2101.06983) splits the backward pass at the embeddings. The loss needs all of them at once but
little memory; the encoder needs much memory but treats each text alone. So: embed all texts in micro-batches, compute
the loss and its gradient on the embeddings, then run backward one micro-batch at a time, seeded with that gradient.
The sum of these backward passes is exactly the gradient of the whole batch.

What this version does differently from others is described in docs/contrastive_step.md: micro-batches are packs
with hardly any padding, and the graphs of as many as memory allows are kept instead of computed a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..modeling.encoder import E5Model
from ..modeling.packed.decoder import packed_attention_of
from ..modeling.packed.layout import Pack
from ..modeling.packed.micro_batches import MicroBatch, make_micro_batches
from .memory import free_memory, graph_bytes
from .objective import ContrastiveObjective, ObjectiveOutput


logger = logging.getLogger(__name__)

# A forward without a graph needs little memory: on an accelerator its micro-batches are this much larger.
FORWARD_ONLY_FACTOR = 4
# Share of the free memory that "auto" gives to kept graphs; the rest is for the backward pass and the optimizer.
KEEP_SHARE = 0.6
# Where the step is known to be exact; besides, FSDP version 2.
SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED}


class ContrastiveStep:
    """Forward and backward of one contrastive batch.

    Exact for one process, DDP, DeepSpeed ZeRO-1, 2 and 3 and FSDP 2, with any number of rows per process, with
    dropout, in any precision (docs/contrastive_step.md has the measured errors).

    Args:
        model: the [`~hf_e5.E5Model`], as the accelerator prepared it (bare, DDP, DeepSpeed engine or FSDP 2).
        objective: the loss of all embeddings of the batch.
        accelerator: runs backward, and so owns loss scaling, gradient synchronisation and ZeRO.
        mini_batch_num_tokens: token budget of one forward pass, at least 1; a longer text has a pass alone.
        keep_graph_num_tokens: tokens whose graphs are kept instead of computed again in the backward pass, at least
            those of the last micro-batch; `auto` measures what fits the free memory.

    Raises:
        InputError: The accelerator distributes in a way for which the step is not known to be exact (FSDP 1).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: ContrastiveObjective,
        accelerator: Accelerator,
        *,
        mini_batch_num_tokens: int,
        keep_graph_num_tokens: int | Literal["auto"],
    ):
        if accelerator.distributed_type not in SUPPORTED and not accelerator.is_fsdp2:
            raise InputError(
                f"training under {accelerator.distributed_type.value} is not supported: "
                "use DDP, DeepSpeed or FSDP version 2"
            )
        self.model, self.objective, self.accelerator = model, objective, accelerator
        self.encoder: E5Model = accelerator.unwrap_model(model)
        self._budget, self._keep_tokens = mini_batch_num_tokens, keep_graph_num_tokens
        self._is_logged = False

    def __call__(self, batch: dict[str, Tensor], *, loss_scale: float = 1.0) -> ObjectiveOutput:
        """Add the gradients of `loss_scale` x loss to the parameters.

        Args:
            batch: of [`~hf_e5.E5DataCollator`], on the model's device.
            loss_scale: 1 / gradient accumulation steps. The returned loss is not scaled.

        Returns:
            What the objective returned; everything detached and on the device, so that nothing waits for it.
        """
        plan = self.plan(batch)
        # Activation checkpointing looks up the attention function again in the backward pass: hence around everything.
        is_packed = isinstance(plan.kept[0], Pack)
        with packed_attention_of(self.encoder.backbone) if is_packed else nullcontext():
            embeddings, graphs, rng_states = self._forward(plan, num_texts=len(batch["lengths"]))
            output = self.objective(embeddings, batch)
            self._backward(plan, output.grad * loss_scale, graphs, rng_states)
        return output

    def plan(self, batch: dict[str, Tensor]) -> Plan:
        """Cut the batch into micro-batches and decide which graphs to keep: alike on every process."""
        prefix_lengths = batch["prefix_lengths"].cpu()
        cut = partial(
            make_micro_batches,
            self.encoder.backbone,
            batch["input_ids"],
            batch["lengths"],
            pooling=self.encoder.pooling,
            prefix_lengths=prefix_lengths,
        )
        micro_batches = list(cut(max_tokens=self._budget))
        if self._keep_tokens == "auto":
            self._keep_tokens = self._affordable_tokens(micro_batches[0])
        tokens = 0
        num_kept = 0
        for micro_batch in reversed(micro_batches):
            tokens += micro_batch.num_tokens
            num_kept += tokens <= self._keep_tokens
        # One graph at a time is needed anyway, so the last one is never computed twice.
        num_kept = max(num_kept, 1)
        num_micro_batches, num_kept = self._agree(len(micro_batches), num_kept)
        micro_batches = _fill(micro_batches, num_micro_batches)
        num_recomputed = num_micro_batches - num_kept
        recomputed, kept = micro_batches[:num_recomputed], micro_batches[num_recomputed:]
        forward_only = recomputed
        if recomputed and self.accelerator.device.type != "cpu" and not self._has_dropout():
            # Without dropout both passes need not be cut alike.
            texts = torch.cat([micro_batch.texts for micro_batch in recomputed]).tolist()
            forward_only = list(cut(max_tokens=self._budget * FORWARD_ONLY_FACTOR, texts=texts))
            forward_only = forward_only or recomputed[:1]  # nothing but fillers
            forward_only = _fill(forward_only, self._agree(len(forward_only), 0)[0])
        plan = Plan(kept, recomputed, forward_only)
        if not self._is_logged:
            logger.info("contrastive step: %s", plan)
            self._is_logged = True
        return plan

    def _affordable_tokens(self, micro_batch: MicroBatch) -> int:
        """How many tokens' graphs fit the free memory, from the graph of one micro-batch."""
        device = self.accelerator.device
        with self._no_sync(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            num_bytes = graph_bytes(lambda: self._embed(micro_batch), self.encoder)
        per_token = max(num_bytes / micro_batch.num_tokens, 1)
        trained = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        # The first step comes before gradients and AdamW's two moments are allocated.
        to_come = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        free = max(free_memory(device) - to_come, 0)
        return int(KEEP_SHARE * free / per_token)

    def _forward(self, plan: Plan, num_texts: int) -> tuple[Tensor, list[Tensor], list[_RandomState]]:
        """Embed all texts: [num_texts, D] fp32 detached, the kept graphs' outputs, the random states of the others."""
        graphs: list[Tensor] = []
        rng_states: list[_RandomState] = []
        outputs: list[Tensor] = []
        # DDP prepares its reduction in the forward pass: only one whose backward is the step's last may synchronise.
        with self._no_sync() if plan.recomputed else nullcontext():
            with torch.no_grad():  # first, while no graph takes memory
                for micro_batch in plan.forward_only:
                    rng_states.append(_RandomState(self.accelerator.device))
                    outputs.append(self._embed(micro_batch))
            graphs = [self._embed(micro_batch) for micro_batch in plan.kept]
        embeddings = graphs[0].new_empty(num_texts, graphs[0].shape[1])
        for micro_batch, output in zip([*plan.kept, *plan.forward_only], [*graphs, *outputs], strict=True):
            embeddings[micro_batch.texts] = output.detach()
        return embeddings, graphs, rng_states

    def _backward(self, plan: Plan, grad: Tensor, graphs: list[Tensor], rng_states: list[_RandomState]) -> None:
        """Run backward with the gradient on the embeddings [num_texts, D] as seed: first to free the kept graphs."""
        kept_texts = torch.cat([micro_batch.texts for micro_batch in plan.kept])
        surrogate = (torch.cat(graphs) * grad[kept_texts]).sum()
        graphs.clear()
        self._accelerated_backward(surrogate, is_last=not plan.recomputed)
        del surrogate
        for position, micro_batch in enumerate(plan.recomputed):
            is_last = position == len(plan.recomputed) - 1
            with nullcontext() if is_last else self._no_sync():
                replay = rng_states[position].replay() if self._has_dropout() else nullcontext()
                with replay:
                    output = self._embed(micro_batch)
                self._accelerated_backward((output * grad[micro_batch.texts]).sum(), is_last)

    def _embed(self, micro_batch: MicroBatch) -> Tensor:
        """[n, D] fp32 through the prepared model, which owns autocast, DDP's hooks and ZeRO's gathers."""
        return self.model(**micro_batch.inputs)[: len(micro_batch.texts)]  # none of a filler

    def _accelerated_backward(self, surrogate: Tensor, is_last: bool) -> None:
        """`accelerator.backward`; DeepSpeed reduces and steps only at the last one of a synchronising step."""
        state = self.accelerator.gradient_state
        synchronises = self.accelerator.sync_gradients
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        state._set_sync_gradients(synchronises and is_last)
        try:
            self.accelerator.backward(surrogate, **({"scale_wrt_gas": False} if is_deepspeed else {}))
        finally:
            state._set_sync_gradients(synchronises)

    def _no_sync(self) -> AbstractContextManager:
        # Only DDP: ZeRO-2, ZeRO-3 and FSDP reduce after each micro-batch, so that no process holds whole gradients.
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _has_dropout(self) -> bool:
        config = self.encoder.config
        rates = [getattr(config, name, 0.0) or 0.0 for name in ("attention_dropout", "attention_probs_dropout_prob")]
        rates += [module.p for module in self.encoder.modules() if isinstance(module, nn.Dropout)]
        return self.encoder.training and any(rates)

    def _agree(self, largest: int, smallest: int) -> tuple[int, int]:
        """The largest and the smallest of these counts over all processes.

        Gathers of ZeRO-3 and FSDP and broadcasts of DDP happen per forward pass: every process must make equally many.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return largest, smallest
        counts = torch.tensor([largest, -smallest], device=self.accelerator.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return int(counts[0]), -int(counts[1])


@dataclass(frozen=True)
class Plan:
    """Micro-batches whose graphs are kept, and those embedded without a graph first and with one later."""

    kept: list[MicroBatch]
    recomputed: list[MicroBatch]
    forward_only: list[MicroBatch]  # the texts of `recomputed`, possibly in fewer and larger micro-batches

    def __str__(self) -> str:
        kept, recomputed = (sum(batch.num_tokens for batch in part) for part in (self.kept, self.recomputed))
        return (
            f"{kept + recomputed} tokens in {len(self.kept) + len(self.recomputed)} micro-batches, "
            f"{'packed' if isinstance(self.kept[0], Pack) else 'padded'}; "
            f"{recomputed / (kept + recomputed):.0%} of them are encoded twice for lack of memory"
        )


class _RandomState:
    """The generators' state before a forward pass, so that dropout draws the same masks when it is repeated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def _fill(micro_batches: list[MicroBatch], count: int) -> list[MicroBatch]:
    """Pad the list at the front to `count` with copies of the smallest micro-batch; their embeddings are ignored."""
    smallest = min(micro_batches, key=lambda micro_batch: micro_batch.num_tokens)
    filler = replace(smallest, texts=smallest.texts[:0])
    return [*[filler] * (count - len(micro_batches)), *micro_batches]
