"""The demo's display: live on a terminal, lines of text anywhere else."""

import contextlib
from collections import Counter

MIB = 2**20
EVERY = 8  # steps between two lines of the same answer in plain text


def make_screen(plain: bool):
    """A LiveScreen if rich is there and wanted, else a PlainScreen."""
    if not plain:
        try:
            return LiveScreen()
        except ImportError:
            pass
    return PlainScreen()


class PlainScreen:
    """Lines of text."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    @contextlib.contextmanager
    def answering(self, answers):
        """Print what the answers have grown by, every few tokens."""
        shown = [0] * len(answers)

        def show(i):
            answer = answers[i]
            piece = answer.text[shown[i] :].replace("\n", " ")
            if piece:
                print(f"  {i + 1}| {piece}", flush=True)
            shown[i] = len(answer.text)

        def refresh():
            for i, answer in enumerate(answers):
                if answer.finished or len(answer.tokens) % EVERY == 0:
                    show(i)

        for i, answer in enumerate(answers):
            print(f"  {i + 1}: {answer.question}", flush=True)
        yield refresh
        for i in range(len(answers)):
            show(i)

    def report(self, run) -> None:
        print("\nEach token against mlx-lm's own (= equal, x different):")
        for answer in run.answers:
            marks = "".join("=" if equal else "x" for equal in answer.marks)
            print(f"  {answer.question}\n    {marks} {verdict(answer)}")
        print(f"\n{map_title(run)}")
        for question, cells in map_rows(run):
            line = "".join(f"[{page:>2}]" if shared else f" {page:>2} " for page, shared in cells)
            print(f"  {question:<36} {line}")
        print(f"  {'the pool':<36} {pool_strip(run)}")
        print("\nMemory of K and V at the peak:")
        for name, figure in memory_rows(run):
            print(f"  {name:<36} {figure}")
        print(f"\n{conclusion(run)}")


class LiveScreen:
    """A display that redraws itself, with rich."""

    def __init__(self):
        from rich.console import Console

        self.console = Console()

    def say(self, line: str) -> None:
        self.console.print(f"[dim]{line}[/dim]")

    @contextlib.contextmanager
    def answering(self, answers):
        """Show all answers as they grow: green where the token equals stock's."""
        from rich.live import Live

        with Live(self._answers(answers), console=self.console, refresh_per_second=8) as live:
            yield lambda: live.update(self._answers(answers))

    def _answers(self, answers):
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 1, 0))
        table.add_column(style="bold", max_width=24)
        table.add_column(ratio=1)
        table.add_column(justify="right", no_wrap=True)
        for answer in answers:
            table.add_row(answer.question, self._text(answer, Text()), verdict(answer))
        return table

    def _text(self, answer, text):
        pieces = growing_pieces(answer)
        for piece, equal in zip(pieces, answer.marks + [None] * len(pieces)):
            text.append(piece, style={True: "green", False: "bold red", None: "dim"}[equal])
        return text

    def report(self, run) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=map_title(run), title_justify="left", box=None, show_header=False)
        for question, cells in map_rows(run):
            line = Text()
            for page, shared in cells:
                line.append(f"{page:^4}", style="black on green" if shared else "black on cyan")
                line.append(" ")
            table.add_row(question, line)
        table.add_row("the pool", pool_strip(run))
        self.console.print(table)
        memory = Table(title="Memory of K and V at the peak", title_justify="left", box=None)
        memory.show_header = False
        for row in memory_rows(run):
            memory.add_row(*row)
        self.console.print(memory)
        self.console.print(conclusion(run), style="bold green" if run.all_equal else "bold red")


# What both say


def growing_pieces(answer) -> list[str]:
    """The text that each token has added; a character split over tokens comes with its last."""
    pieces, before = [], ""
    for count in range(1, len(answer.tokens) + 1):
        text = answer.decode(answer.tokens[:count])
        whole = text.rstrip("\ufffd")
        pieces.append(whole[len(before) :])
        before = whole
    return pieces


def verdict(answer) -> str:
    equal, compared = sum(answer.marks), len(answer.marks)
    return f"{equal} of {compared} tokens equal"


def map_title(run) -> str:
    used = len({page for row in run.page_map for page in row})
    return (
        f"Page map: {len(run.page_map)} sequences on {used} of {run.group.allocator.total_pages} "
        f"pages of {run.group.page_size} tokens; those in [ ] or green are shared"
    )


def map_rows(run):
    """(question, [(page, whether others hold it too), ...]) of each sequence."""
    holders = Counter(page for row in run.page_map for page in row)
    for answer, row in zip(run.answers, run.page_map):
        yield answer.question, [(page, holders[page] > 1) for page in row]


def pool_strip(run) -> str:
    """One character for each page: # shared, the number of its sequence, . free."""
    strip = ["."] * run.group.allocator.total_pages
    for i, (_, cells) in enumerate(map_rows(run)):
        for page, shared in cells:
            strip[page] = "#" if shared else str(i + 1)
    return "".join(strip)


def memory_rows(run):
    memory = run.memory
    ratio = memory.stock / memory.pages
    yield "pages, allocated", f"{memory.pages / MIB:7.1f} MiB"
    yield "of these in use", f"{memory.pages_in_use / MIB:7.1f} MiB"
    yield "mlx-lm's caches, allocated", f"{memory.stock / MIB:7.1f} MiB, {ratio:.2f} times as much"


def conclusion(run) -> str:
    tokens = sum(len(answer.tokens) for answer in run.answers)
    calls, gathered = run.paged.paged_calls, sum(run.paged.gathered_calls.values())
    route = f"{calls} attention calls read the pages directly, {gathered} went through a gather"
    if run.all_equal:
        return f"All {tokens} tokens equal mlx-lm's own. {route}."
    return f"The tokens are NOT all equal to mlx-lm's own. {route}."
