"""What MLX's evaluator holds in memory while it runs a graph: its order, its buffers, its frees.

The order is that of MLX's `eval_impl`: breadth first from the outputs, 20 arrays wide, each when
all who read it are placed, then backwards. A buffer is free when no array and no pending command
holds it. The evaluator runs ahead of the device, and what a command reads stays until it is done;
how far ahead is a `Pace`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .buffers import Layout, dense
from .layout import lay_out
from .tape import Graph, Node

__all__ = ["CPU", "IN_STEP", "METAL", "Held", "Pace", "Simulation", "simulate"]

_WIDTH = 20


@dataclass(frozen=True)
class Pace:
    """How far allocation runs ahead of computation, when computation is the slower one.

    Attributes:
        tasks: tasks that may wait for the device; 0 is no running ahead.
        commands: dispatches of a task.
        share: the share of the CPU's dispatches; Metal has none for views, one for a primitive.
        elements: a task ends early when its commands read more elements than this.
        page: sizes over a page are rounded up to whole pages.
    """

    tasks: int = 10
    commands: int = 10
    share: int = 1
    elements: float = float("inf")
    page: int = 1


CPU = Pace()
METAL = Pace(commands=50, share=2, elements=50 * 2**20, page=16384)
IN_STEP = Pace(tasks=0)


@dataclass(frozen=True)
class Held:
    """A buffer at the peak: its bytes, the shape and primitive that it was made for."""

    nbytes: int
    shape: tuple[int, ...]
    itemsize: int
    op: str


@dataclass
class Simulation:
    """Bytes over one evaluation.

    Attributes:
        start: bytes of the inputs and constants.
        peak: the most bytes at a time, inputs included.
        end: bytes after it.
        held: what was alive at the peak, beside inputs and constants.
        count: primitives that ran.
    """

    start: int = 0
    peak: int = 0
    end: int = 0
    held: list[Held] = field(default_factory=list)
    count: int = 0


def simulate(
    graph: Graph,
    *,
    released: Iterable[int] = (),
    pace: Pace = CPU,
    limit: float = float("inf"),
    with_held: bool = False,
) -> Simulation:
    """Run the evaluator over a graph, counting bytes.

    Args:
        released: inputs that nobody holds once the evaluation has begun: their buffers may be
            taken over. The other inputs and the constants stay.
        limit: the allocator's memory limit: above it the evaluator waits for the device.
        with_held: list what is alive at the peak.
    """
    order = evaluation_order(graph)
    run = _Run(graph, order, set(released), pace, limit)
    if with_held:
        run.watch_for = simulate(graph, released=released, pace=pace, limit=limit).peak
    for node in order:
        run.evaluate(node)
    run.finish()
    return run.result


def evaluation_order(graph: Graph) -> list[Node]:
    """The nodes that the outputs need, in the order in which they run."""
    readers: dict[int, int] = {}
    makers = graph.maker
    root = Node("Synchronizer", None, graph.outputs, [])
    seen = {id(root)}
    stack = [root]
    while stack:
        for array in stack.pop().inputs:
            maker = makers[array]
            if maker is not None:
                key = id(maker)
                readers[key] = readers.get(key, 0) + 1
                if key not in seen:
                    seen.add(key)
                    stack.append(maker)
    placed, at = [root], 0
    later: list[tuple[Node, int]] = []
    while at < len(placed) or later:
        if at < len(placed):
            node, first = placed[at], 0
            at += 1
        else:
            node, first = later.pop()
        inputs = node.inputs
        for position in range(first, len(inputs)):
            maker = makers[inputs[position]]
            if maker is None:
                continue
            if len(placed) - at >= _WIDTH:
                later.append((node, position))
                break
            key = id(maker)
            readers[key] -= 1
            if not readers[key]:
                placed.append(maker)
    return placed[:0:-1]


class _Run:
    """One evaluation: the state of every buffer. `layout.Memory` in the rules' words."""

    def __init__(
        self, graph: Graph, order: list[Node], released: set[int], pace: Pace, limit: float
    ):
        self.graph, self.pace, self.limit = graph, pace, limit
        self.layouts: list[Layout | None] = [None] * len(graph.shapes)
        self.sizes: list[int] = []
        self.holders: list[int] = []  # arrays and pending commands, by buffer
        self.readers = [0] * len(graph.shapes)  # nodes to come that read an array, and outsiders
        self.made_for: list[tuple[int, str]] = []
        self.temporaries: list[int] = []
        self.active, self.result = 0, Simulation(count=len(order))
        self.watch_for: int | None = None
        self.pending: deque[tuple[int, list[int]]] = deque()
        self.in_task, self.elements, self.task, self.done = 0, 0, 0, 0
        self.op, self.array = "", -1
        for node in order:
            for array in node.inputs:
                self.readers[array] += len(node.outputs)
        for array in graph.outputs:
            self.readers[array] += 1
        for array in [*graph.inputs, *graph.constants]:
            self._place_input(array, held=array not in released)
        self.result.start = self.result.peak = self.active

    def _place_input(self, array: int, held: bool) -> None:
        if self.layouts[array] is not None:
            return
        self.op, self.array = "input", array
        self.layouts[array] = dense(self, array)
        self.readers[array] += held
        self.holders[-1] = 1

    # ------------------------------------------------------------ what the rules ask

    def allocate(self, nbytes: int) -> int:
        page = self.pace.page
        if nbytes > page > 1:
            nbytes = -(-nbytes // page) * page
        self.sizes.append(nbytes)
        self.holders.append(0)
        self.made_for.append((self.array, self.op))
        self.active += nbytes
        if self.active > self.result.peak:
            self.result.peak = self.active
        if self.active == self.watch_for and not self.result.held:
            self._list_held()
        return len(self.sizes) - 1

    def temporary(self, nbytes: int) -> None:
        self.temporaries.append(self.allocate(nbytes))
        self.holders[self.temporaries[-1]] = 1

    def is_free(self, node: Node, array: int) -> bool:
        layout = self.layouts[array]
        return (
            self.readers[array] == 1
            and len(node.outputs) == 1
            and layout is not None
            and self.holders[layout.buffer] == 1
        )

    def buffer_size(self, buffer: int) -> int:
        return self.sizes[buffer]

    # ------------------------------------------------------------ one node

    def evaluate(self, node: Node) -> None:
        layouts, holders = self.layouts, self.holders
        self.op, self.array = node.op, node.outputs[0]
        commands = lay_out(self, node)
        mine = [layouts[out].buffer for out in node.outputs]  # type: ignore[union-attr]
        for buffer in mine:
            holders[buffer] += 1
        read = {layouts[array].buffer for array in node.inputs}  # type: ignore[union-attr]
        read.update(mine[1:])
        read.discard(mine[0])
        for buffer in read:
            holders[buffer] += 1
        held = [*read, *self.temporaries]
        self.temporaries = []
        for array in node.inputs:
            self.readers[array] -= len(node.outputs)
            if not self.readers[array]:
                self._drop(layouts[array].buffer)  # type: ignore[union-attr]
        for out, buffer in zip(node.outputs, mine):
            if not self.readers[out]:
                self._drop(buffer)
        self._dispatch(commands, held)

    def _dispatch(self, commands: int, held: list[int]) -> None:
        pace = self.pace
        if not pace.tasks:
            for buffer in held:
                self._drop(buffer)
            return
        self.pending.append((self.task, held))
        self.in_task += commands // pace.share
        if pace.elements < float("inf"):
            self.elements += sum(self.sizes[buffer] for buffer in held) // 4
        if self.in_task >= pace.commands or self.elements > pace.elements:
            self.task += 1
            self.in_task, self.elements = self.in_task % pace.commands, 0
        while self.task - self.done > pace.tasks or (
            self.active > self.limit and self.task > self.done
        ):
            self._complete_a_task()

    def _complete_a_task(self) -> None:
        while self.pending and self.pending[0][0] <= self.done:
            for buffer in self.pending.popleft()[1]:
                self._drop(buffer)
        self.done += 1

    def _drop(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        if not self.holders[buffer]:
            self.active -= self.sizes[buffer]

    def finish(self) -> None:
        while self.pending:
            for buffer in self.pending.popleft()[1]:
                self._drop(buffer)
        self.result.end = self.active

    def _list_held(self) -> None:
        graph = self.graph
        self.result.held = [
            Held(self.sizes[buffer], graph.shapes[array], graph.itemsizes[array], op)
            for buffer, (array, op) in enumerate(self.made_for)
            if op != "input" and (self.holders[buffer] or buffer == len(self.sizes) - 1)
        ]
