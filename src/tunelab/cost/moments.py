"""The moments of a run at which memory is fullest, and what each holds: the forecast of peak memory.

Not everything stands at once. Gradients appear as activations go; the logits are gone before the blocks' backward
passes begin; an optimizer's state is there from the second step on. So each moment is counted by itself, and the peak
is the largest of them:

    start        weights, and what the allocator keeps of earlier work
    reference    weights, the activations of a forward pass, one chunk of logits
    evaluation   the same, with the optimizer's state
    generation   weights and their copies in the products' type, the KV cache, logits of each row
    head         everything that the forward pass kept, a chunk of logits, the head's gradient
    block l      what blocks 1…l kept, gradients of l…L and of the head, what block l's backward pass takes for itself
    update       weights, gradients, state
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunelab.cost.activations import BlockBytes, Items, Path, block_bytes
from tunelab.cost.parameters import Weight
from tunelab.cost.rows import Row
from tunelab.cost.shape import ModelShape

PARTS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "kv_cache",
    "copies",
    "allocator",
    "framework",
)
"""In the order of tables: copies are weights in the products' type; allocator is what fragments of freed memory and
prepared kernels take (CPU); framework is the process itself."""

HELD_OF_ACTIVATIONS, HELD_OF_GRADIENTS = 0.4, 0.5
"""What lies free in a CPU's C library heap and cannot be used again, as shares of the activations and of the gradients
of a whole step: rows differ in length from step to step, and what one leaves does not fit the next."""

KERNEL_BYTES = 110 << 20
"""What oneDNN makes for rows of new lengths, and keeps, within the first steps of a run; afterwards lengths, rounded
(`models/alignment.py`), come again. This and the shares above are fitted to benchmarks/forecast.py: docs/plan.md."""

HEAP_BLOCK = 32 << 20
"""Larger blocks are the kernel's, and go back to it whole (`parallel.keep_freed_memory`)."""

LOGIT_BYTES = 4
"""Float32 in every precision."""


@dataclass(frozen=True)
class Moment:
    """Bytes by part that stand at one time."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Generation:
    """Answers written together: rows, tokens of the longest prompt with its answer, tokens of all prompts."""

    rows: int
    columns: int
    prompt_tokens: int


@dataclass(frozen=True)
class Workload:
    """What the memory has to serve.

    train: the largest rows a step trains on. micro_batches: of a step. evaluation, reference: the largest rows scored
    without gradients, None where there are none. chunk_size: rows of logits at a time. later_steps: there is a second
    step, which finds the optimizer's state already there.
    """

    train: Sequence[Row]
    micro_batches: int
    chunk_size: int
    evaluation: Row | None = None
    reference: Row | None = None
    generation: Generation | None = None
    later_steps: bool = True


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as memory minds.

    items: bytes of a number. path: how blocks are computed. optimizer: bytes of its state. transient: bytes an update
    takes for a moment. release: gradients are used up in the backward pass, tensor by tensor. framework: the process
    beside all that. kept: freed before the run begins, and kept by the allocator for what comes. on_cpu: memory is the
    C library's to hand out.
    """

    shape: ModelShape
    weights: Sequence[Weight]
    items: Items
    path: Path
    optimizer: int
    transient: int = 0
    checkpointing: bool = False
    release: bool = False
    framework: int = 0
    kept: int = 0
    on_cpu: bool = False
    prunes: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prunes", self.path == "fused" and self.shape.blocks[-1].is_known)


def memory_moments(training: Training, workload: Workload) -> list[Moment]:
    """Every moment that may be the fullest, for every row of `workload.train`."""
    found = [_moment(training, "start", state=0, copies=training.kept), *_without_gradients(training, workload)]
    for row in workload.train:
        found += _Step(training, workload, row).moments()
    found.append(_update(training))
    return [_with_allocator(moment, training) for moment in found] if training.on_cpu else found


def peak(moments: Sequence[Moment]) -> Moment:
    """The fullest."""
    return max(moments, key=lambda moment: moment.total)


def _with_allocator(moment: Moment, training: Training) -> Moment:
    """What a CPU's allocator and libraries hold beside the tensors of the moment."""
    if moment.name == "start":
        return moment
    held = HELD_OF_ACTIVATIONS * moment.parts["activations"] + KERNEL_BYTES
    if moment.name != "reference":
        sizes = [weight.numel * weight.itemsize for weight in training.weights if weight.trained]
        held += HELD_OF_GRADIENTS * sum(size for size in sizes if size < HEAP_BLOCK)
    return Moment(moment.name, {**moment.parts, "allocator": int(held)})


# --- without gradients ----------------------------------------------------------------------------------------------


def _without_gradients(training: Training, workload: Workload) -> Iterator[Moment]:
    if workload.reference is not None:
        yield _moment(training, "reference", state=0, **_forward(training, workload.reference, workload.chunk_size))
    if workload.evaluation is not None:
        yield _moment(training, "evaluation", **_forward(training, workload.evaluation, workload.chunk_size))
    if workload.generation is not None:
        yield _moment(training, "generation", **_generation(training, workload.generation))


def _forward(training: Training, row: Row, chunk_size: int) -> dict[str, int]:
    seen = row.unpruned(padded=True) if training.path == "padded" else row
    blocks = _blocks(training, seen)
    activations = max(block.boundary + block.forward for block in blocks)
    return {
        "activations": activations,
        "logits": _logits(training, row, chunk_size),
        "copies": _head_copy(training),
    }


def _generation(training: Training, generation: Generation) -> dict[str, int]:
    """The cache of keys and values, the prefill's activations; weights once more where products have another type."""
    shape, a = training.shape, training.items.product
    width = shape.blocks[0].width("key", "value") if shape.blocks[0].is_known else 2 * shape.hidden_size
    prefill = Row(generation.prompt_tokens, generation.prompt_tokens, 0, generation.rows, generation.columns)
    copied = sum(w.numel for w in training.weights if len(w.shape) == 2 and not w.added) if training.items.narrow else 0
    return {
        "activations": max(block.boundary + block.forward for block in _blocks(training, prefill)),
        "logits": generation.rows * shape.vocab_size * (LOGIT_BYTES + training.items.narrow),
        "kv_cache": shape.num_layers * generation.rows * generation.columns * width * a,
        "copies": copied * a,
    }


# --- a step ---------------------------------------------------------------------------------------------------------


class _Step:
    """The moments of one row's forward and backward pass."""

    def __init__(self, training: Training, workload: Workload, row: Row) -> None:
        self.training, self.workload, self.row = training, workload, row
        padded = training.path == "padded"
        self.blocks = _blocks(training, row.unpruned(padded) if not training.prunes else row)
        self.first = _first_kept(training)
        self.accumulates = workload.micro_batches > 1
        self.state = training.optimizer if workload.later_steps else 0
        by_block: dict[int | None, int] = {}
        for weight in training.weights:
            if weight.trained:
                by_block[weight.block] = by_block.get(weight.block, 0) + weight.numel * weight.itemsize
        self.block_gradients = [by_block.get(number, 0) for number in range(len(self.blocks))]
        self.outside = by_block.get(None, 0)
        self.all_gradients = sum(by_block.values())
        self.head_gradient = _head_gradient(training)

    def moments(self) -> Iterator[Moment]:
        yield self._head()
        for number in range(self.first, len(self.blocks)):
            yield from self._block(number)

    def _kept(self, upto: int) -> int:
        """What blocks before `upto` keep for their backward passes."""
        checkpointing = self.training.checkpointing
        kept = [block.boundary if checkpointing else block.kept for block in self.blocks[self.first : upto]]
        return sum(kept)

    def _head(self) -> Moment:
        """Forward is at its end: the logits and what the head's gradients take."""
        training, row = self.training, self.row
        final = row.loss_positions * training.shape.hidden_size * (2 * training.items.residual + training.items.product)
        gradients = self.head_gradient * max(1, LOGIT_BYTES // _head_itemsize(training))
        if self.accumulates and not training.release:
            gradients += self.all_gradients
        return _moment(
            training,
            "head",
            state=self.state,
            activations=self._kept(len(self.blocks)) + final,
            logits=_logits(training, row, self.workload.chunk_size),
            gradients=gradients,
            copies=_head_copy(training),
        )

    def _block(self, number: int) -> Iterator[Moment]:
        block, training = self.blocks[number], self.training
        before, own = self._kept(number), self.block_gradients[number]
        standing = self.head_gradient if training.release else self._standing(number)
        halves = (("mlp", block.kept + block.mlp, own // 2), ("attention", block.front + block.first, own))
        copy = _largest_copy(training, number)
        for half, activations, made in halves:
            yield _moment(
                training,
                f"block {number + 1}, {half}",
                state=self.state,
                activations=before + activations,
                gradients=standing + made,
                copies=copy,
            )

    def _standing(self, number: int) -> int:
        """Gradients that are there when the backward pass comes to a block, its own not yet."""
        if self.accumulates:
            tied = self.head_gradient if _is_tied(self.training) else 0
            return self.all_gradients + tied
        return self.head_gradient + sum(self.block_gradients[number + 1 :])


def _update(training: Training) -> Moment:
    gradients = 0 if training.release else sum(w.numel * w.itemsize for w in training.weights if w.trained)
    return _moment(training, "update", gradients=gradients, copies=training.transient)


# --- parts ----------------------------------------------------------------------------------------------------------


def _moment(training: Training, name: str, *, state: int | None = None, **parts: int) -> Moment:
    held = {
        "weights": sum(w.bytes for w in training.weights if not w.added),
        "adapter": sum(w.bytes for w in training.weights if w.added),
        "optimizer": training.optimizer if state is None else state,
        "framework": training.framework,
        **parts,
    }
    held["copies"] = held.get("copies", 0) + _unpacked_pages(training)
    return Moment(name, {part: held.get(part, 0) for part in PARTS})


def _unpacked_pages(training: Training) -> int:
    """On a CPU a file of weights is mapped, and stays so while a tensor of it is in use: the pages that were read to be
    packed into 4 bits count as resident memory, though the system can take them back.
    """
    packed = [w.numel * w.itemsize for w in training.weights if w.bytes < w.numel * w.itemsize]
    return sum(packed) if training.on_cpu else 0


def _blocks(training: Training, row: Row) -> list[BlockBytes]:
    """Every block's bytes; on the fused path the last one computes the row's kept positions only."""
    whole = row.unpruned()
    shape, path, items = training.shape, training.path, training.items
    found = [block_bytes(block, shape, whole, path, items) for block in shape.blocks[:-1]]
    last = row if training.prunes else whole
    return [*found, block_bytes(shape.blocks[-1], shape, last, path, items)]


def _first_kept(training: Training) -> int:
    """The first block that autograd remembers: beneath it nothing learns."""
    shape = training.shape
    if shape.embeddings_trained:
        return 0
    return next((number for number, block in enumerate(shape.blocks) if block.learns), shape.num_layers)


def _logits(training: Training, row: Row, chunk_size: int) -> int:
    """A chunk in float32, and in the products' type where that is another. Padded rows have the model's full logits,
    and those of the loss positions twice: themselves and their logarithms.
    """
    vocabulary = training.shape.vocab_size
    if training.path == "padded":
        whole = row.padded * training.items.product
        return vocabulary * (whole + 2 * row.loss_positions * LOGIT_BYTES)
    chunks = max(1, -(-row.loss_positions // chunk_size))
    rows = -(-row.loss_positions // chunks) + 1
    return rows * vocabulary * (LOGIT_BYTES + training.items.narrow)


def _head_weight(training: Training) -> Weight | None:
    """The output projection, which may be the embedding; None where it has another shape (and then nothing is said)."""
    wanted = (training.shape.vocab_size, training.shape.hidden_size)
    found = [w for w in training.weights if w.shape == wanted and w.block is None and not w.added]
    return found[-1] if found else None


def _is_tied(training: Training) -> bool:
    wanted = (training.shape.vocab_size, training.shape.hidden_size)
    return sum(w.shape == wanted and w.block is None and not w.added for w in training.weights) == 1


def _head_itemsize(training: Training) -> int:
    head = _head_weight(training)
    return LOGIT_BYTES if head is None else head.itemsize


def _head_gradient(training: Training) -> int:
    head = _head_weight(training)
    return head.numel * head.itemsize if head is not None and head.trained else 0


def _head_copy(training: Training) -> int:
    """The head's weight in the products' type."""
    head = _head_weight(training)
    return head.numel * training.items.product if head is not None and training.items.narrow else 0


def _largest_copy(training: Training, block: int) -> int:
    """Of one matrix of the block at a time: in the products' type, or dequantised."""
    sizes = [w.numel for w in training.weights if w.block == block and len(w.shape) == 2 and not w.added]
    packed = any(w.bytes < w.numel for w in training.weights if w.block == block)
    return max(sizes, default=0) * training.items.product if training.items.narrow or packed else 0
