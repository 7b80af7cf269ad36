"""What `omnilmm train`, `omnilmm eval-nano` and `omnilmm merge-adapter` do."""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.train_ray import Place, train_on_ray
from omnilmm.config import InputHandling
from omnilmm.errors import OmniError, StartupError

if TYPE_CHECKING:
    from omnilmm.training.config import TrainingConfig
    from omnilmm.training.evaluation import Report, Score
    from omnilmm.training.learner import Learner


def train(
    config: Annotated[Path, typer.Option(help="A YAML file that describes the run.", exists=True, dir_okay=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest state in the output folder.")] = False,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of each worker; 0 for every core, or one where there are several.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the rows of a step.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help='Have the workers on a Ray cluster: its address, "auto", or "local" for one of our own.'),
    ] = None,
) -> None:
    """Tune a model on conversations with pictures. Ctrl-C saves a state to resume from and stops."""
    from omnilmm.training.config import read_training_config

    settings = read_training_config(config)  # what is wrong with it is told before anything starts
    if ray is not None:
        _train_on_ray(settings, Place(ray, workers, threads or 1), config, resume)
        return
    if workers == 1:
        _train(0, config, resume, threads, 1, "")
        return
    with tempfile.TemporaryDirectory() as meeting:
        _run_together(workers, config, resume, threads or 1, Path(meeting))


def _train_on_ray(settings: TrainingConfig, place: Place, config: Path, resume: bool) -> None:
    from omnilmm.training.curve import Bar

    console = Console(highlight=False, soft_wrap=True)
    asked = _StopAsked()
    with Bar(settings.steps, console) as display:
        written = train_on_ray(settings, place, resume=resume, display=display, should_stop=asked)
    if written is None:
        options = f"--workers {place.workers} --ray {place.address}"
        console.print(f"stopped; go on with: omnilmm train --config {config} --resume {options}")
    else:
        console.print(f"written: {written}")


def _run_together(workers: int, config: Path, resume: bool, threads: int, meeting: Path) -> None:
    """Run `_train` in that many processes until all have ended. Ctrl-C reaches them from the terminal, and SIGTERM from
    here: they agree on a step, save and end.

    Raises:
        OmniError: a worker failed; the others are ended.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    shared = (config, resume, threads, workers, meeting)
    started = start_processes(_take_part, args=shared, nprocs=workers, join=False, start_method="spawn")

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in started.pids():
            os.kill(pid, signal.SIGTERM)

    before = [(signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))]
    before.append((signal.SIGTERM, signal.signal(signal.SIGTERM, pass_on)))
    try:
        while not started.join():
            pass
    except ProcessException as failure:
        raise _told_by(failure.error_index, meeting, failure) from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _take_part(  # noqa: PLR0917  torch hands them over by place
    rank: int, config: Path, resume: bool, threads: int, workers: int, meeting: Path
) -> None:
    """One worker of several. An error of ours is left in `meeting` for whoever started it."""
    try:
        _train(rank, config, resume, threads, workers, f"file://{meeting}/place")
    except OmniError as error:
        from omnilmm.training.workers import WorkerLost

        is_cause = not isinstance(error, WorkerLost)
        (meeting / f"failed-{rank}.json").write_text(json.dumps([is_cause, error.message]), encoding="utf-8")
        raise SystemExit(1) from None


def _told_by(rank: int, meeting: Path, failure: Exception) -> OmniError:
    """What the workers said went wrong: the cause rather than that they lost each other. Where none said anything, that
    worker `rank` ended."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(meeting.glob("failed-*.json"))]
    causes = [message for is_cause, message in told if is_cause]
    if causes:
        return OmniError(causes[0])
    from torch.multiprocessing.spawn import ProcessRaisedException

    if isinstance(failure, ProcessRaisedException):
        raise failure  # a defect of ours: with its traceback
    return StartupError(f"worker {rank} has ended; --resume goes on from the latest state")


def _train(  # noqa: PLR0917  torch hands them over by place
    rank: int, config: Path, resume: bool, threads: int, workers: int, meeting: str
) -> None:
    """One worker of the run. `meeting` is the URL under which torch's process group finds together."""
    from torch import distributed

    from omnilmm.models.device import use_threads
    from omnilmm.training.config import read_training_config
    from omnilmm.training.curve import Bar, Quiet
    from omnilmm.training.run import train as run

    settings = read_training_config(config)
    use_threads(threads)
    console = Console(highlight=False, soft_wrap=True, quiet=rank > 0)
    asked = _StopAsked()
    if workers > 1:
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    with Bar(settings.steps, console) if rank == 0 else nullcontext(Quiet()) as display:
        written = run(settings, resume=resume, display=display, should_stop=asked)
    if workers > 1:
        distributed.destroy_process_group()
    if written is None:
        console.print(f"stopped; go on with: omnilmm train --config {config} --resume")
    else:
        console.print(f"written: {written}")


def eval_nano(  # noqa: PLR0917  the parameters of a command are its options
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.", exists=True, file_okay=False)],
    seed: Annotated[int | None, typer.Option(help="World of the scenes; a fresh one each time if not given.")] = None,
    scenes: Annotated[int, typer.Option(min=2, help="Scenes of each kind of exam.")] = 300,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for every core.")] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, report.md and two pictures.")] = None,
) -> None:
    """Ask a model about unseen synthetic scenes and count the right answers, by kind and language.

    Three exams: unseen scenes, unseen pairs of colour and shape, and the first one again with the pictures shuffled
    between the questions, which shows what the words alone would give.
    """
    from omnilmm.models.device import use_threads
    from omnilmm.prompt.template import load_template
    from omnilmm.training.evaluation import make_papers, sit_exam
    from omnilmm.training.scenes import Split
    from omnilmm.training.scenes_draw import load_scenery
    from omnilmm.training.sheets import draw_confusion, draw_sheet

    use_threads(threads)
    console = Console(highlight=False)
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    learner = _load(checkpoint, precision)
    template = load_template(learner.config.family, checkpoint, num_image_tokens=learner.config.num_image_tokens)
    scenery, side = load_scenery(), learner.policy.side
    papers = {
        split: make_papers(split, seed, scenes, scenery=scenery, side=side)
        for split in (Split.TEST, Split.COMBINATIONS)
    }
    reports: dict[str, Report] = {}
    for split, paper in papers.items():
        with console.status(f"answering: {split}"):
            reports[split] = sit_exam(paper, learner, template)
    with console.status("answering: shuffled pictures"):
        reports["shuffled"] = sit_exam(papers[Split.TEST], learner, template, shift=max(1, scenes // 2))
    console.print(f"{checkpoint}  seed {seed}  {scenes} scenes an exam")
    console.print(_table(reports))
    for name, report in reports.items():
        console.print(f"{name}: yes to absent things {_percent(report.false_yes())}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(_plain(reports, seed, scenes), indent=1) + "\n", encoding="utf-8")
        (out / "report.md").write_text(_markdown(reports), encoding="utf-8")
        draw_confusion(reports[Split.TEST], out / "confusion.png")
        draw_sheet(papers[Split.TEST], reports[Split.TEST], out / "sheet.png")


def merge_adapter(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint the adapter belongs to.", exists=True)],
    adapter: Annotated[Path, typer.Argument(help="Folder with peft's two files.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Add a LoRA adapter to the weights of a checkpoint, for good."""
    from omnilmm.errors import ConfigError
    from omnilmm.training.export import save_checkpoint
    from omnilmm.training.lora import load_adapter

    if out.exists():
        raise ConfigError("The output folder exists already; name another.", param="out")
    learner = _load(checkpoint, "float32")
    load_adapter(adapter, learner.config).merge_into(learner.language)
    save_checkpoint(out, checkpoint, learner.config, encoder=learner.encoder, language=learner.language, dtype=dtype)
    Console(highlight=False).print(f"written: {out}")


class _StopAsked:
    """Whether Ctrl-C or SIGTERM came. A second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self._asked


def _load(checkpoint: Path, precision: str) -> Learner:
    from omnilmm.models.config import read_model_config
    from omnilmm.training.learner import load_learner

    config = read_model_config(checkpoint)
    config.image_policy(InputHandling.SAFE)  # a text-only model is refused here
    return load_learner(checkpoint, config, learn=(), precision=precision).eval()


def _table(reports: dict[str, Report]) -> Table:
    first, *others = _lines(reports)
    table = Table(*first)
    for line in others:
        table.add_row(*line)
    return table


def _markdown(reports: dict[str, Report]) -> str:
    first, *others = _lines(reports)
    lines = [first, ["---", *["---:"] * (len(first) - 1)], *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _lines(reports: dict[str, Report]) -> list[list[str]]:
    """The accuracies by kind of question, the heads of the columns first."""
    lines = [["question", *(f"{name} {language}" for name in reports for language in ("en", "zh"))]]
    kinds = {kind: None for report in reports.values() for kind in report.kinds()}
    for kind in (*sorted(kinds), None):
        cells = [_percent(score) for report in reports.values() for score in _by_language(report, kind)]
        lines.append([str(kind or "all"), *cells])
    return lines


def _by_language(report: Report, kind: Any) -> list[Score]:
    from omnilmm.training.scenes_words import Language

    return [report.score(kind, language) for language in Language]


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} % ({score.num})" if score.num else "-"


def _plain(reports: dict[str, Report], seed: int, scenes: int) -> dict[str, Any]:
    def figures(score: Score) -> dict[str, int]:
        return {"asked": score.num, "right": score.num_right}

    exams = {
        name: {
            "kinds": {
                str(kind or "all"): {
                    language: figures(score)
                    for language, score in zip(("en", "zh"), _by_language(report, kind), strict=True)
                }
                for kind in (*report.kinds(), None)
            },
            "yes_to_absent": figures(report.false_yes()),
        }
        for name, report in reports.items()
    }
    return {"seed": seed, "scenes": scenes, "exams": exams}
