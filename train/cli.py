"""`subquad train fit|validate|test`: LightningCLI with a run folder, resumable runs and errors of one sentence.

A run's folder holds config.yaml, curve.png, metrics/metrics.csv, tensorboard/, checkpoints/ and, at its end, model/.
"""

import errno
import logging
import os
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import set_dumper, set_loader
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from subquad.errors import UserError, nearest, shown
from subquad.files import sweep, write_folder
from subquad.models import checkpoint
from subquad.reading import dump_yaml, parse_yaml, read_mapping
from subquad.train.checkpoints import AtomicCheckpointIO, RunCheckpoints, Stopped, newest, newest_whole, step_of
from subquad.train.data import TextData
from subquad.train.folders import Lock, first_process
from subquad.train.progress import RunLogger, RunProgress, draw_curve, read_metrics
from subquad.train.task import LanguageModeling
from subquad.train.trust import check_run_config

SUBCOMMANDS = ("fit", "validate", "test")
NOT_OURS_TO_HEED = (
    r".*dataloader is\s+not resumable.*",  # the DataModule restores the position itself
    r".*logging interval.*",
    r".*treespec, LeafSpec.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # its rows are written again on resuming
    r".*`LightningCLI`'s args parameter.*",
    r".*Starting from v1.9.0, `tensorboardX`.*",
    r".*GPU available but not used.*",
    r".*recommended to use `self.log\('(step|val)/?\w*', ..., sync_dist=True\)`.*",  # these are summed already
    r".*Please add the following callbacks: \['RunCheckpoints'\].*",  # validating needs none
)
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no space
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),  # no permission
}
TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "val_check_interval": 200,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


set_loader("subquad", lambda text: parse_yaml(text, "the configuration"), (UserError,))
set_dumper("subquad", dump_yaml)


class Parser(LightningArgumentParser):
    """An argument parser that raises instead of printing its usage, and reads YAML as all of subquad does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, parser_mode="subquad")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message) from ex


class TrainCLI(LightningCLI):
    """Adds the run's folder to LightningCLI, and what reads and writes it."""

    lock: ClassVar[Lock | None] = None  # of the process, which trains one run at a time

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="folder of the run (runs/latest)")
        parser.add_argument("--run", type=str | None, default=None, help="the same; torchrun takes it for its own")
        parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
        parser.add_argument("--trust_code", action="store_true", help="let the run's own config.yaml import classes")
        parser.add_argument("--resume", action="store_true", help="go on from the folder's newest checkpoint")
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between checkpoints")
        parser.link_arguments("seed_everything", "data.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        evaluation = {"model", "dataloaders", "datamodule", "verbose", "weights_only"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}
        return {"fit": fit, "validate": evaluation, "test": evaluation}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except (UserError, ValueError, OSError) as error:
            known = [key for sub in self._subcommand_parsers.values() for key in sub.get_defaults().keys()]  # noqa: SIM118
            raise UserError(one_sentence(str(error), sorted(set(known)))) from error

        seed = self.config[self.config["subcommand"]].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {shown(seed)}; it must be from 0 to {2**32 - 1}")

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        self.run_folder = Path(options.run_dir or options.run or "runs/latest")
        self.resume_from: Path | None = None
        if self.subcommand != "fit":
            return
        if options.checkpoint_every < 1:
            raise UserError(f"checkpoint_every is {options.checkpoint_every}; it must be at least 1")
        if options.overwrite and options.resume:
            raise UserError("--overwrite and --resume exclude each other")
        if first_process():  # the others of a run come to a folder that may be there already
            check_place(self.run_folder)
            try:
                TrainCLI.lock = Lock(self.run_folder)
            except OSError as error:
                raise cannot_make(self.run_folder, error) from error
            if not options.resume:
                check_run_folder(self.run_folder, overwrite=options.overwrite)
        if options.resume:
            self.resume_from = newest_whole(self.run_folder / "checkpoints", say=first_process())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        self.progress = RunProgress(self.run_folder, bar=given["enable_progress_bar"] is not False)
        own: dict[str, Any] = {"enable_progress_bar": False, "logger": False, "default_root_dir": str(self.run_folder)}
        callbacks = [self.progress]
        if given["max_epochs"] is None and given["max_steps"] == -1:
            own["max_epochs"] = 1
        if self.subcommand == "fit":
            if given["logger"] is not False:
                own["logger"] = self._loggers()
            every = self._get(self.config, "checkpoint_every")
            callbacks.append(RunCheckpoints(self.run_folder / "checkpoints", every))
        plugins = given["plugins"] or []
        own["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        try:
            return self._instantiate_trainer({**given, **own, **kwargs}, callbacks)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _loggers(self) -> list[Any]:
        """CSV and TensorBoard; nothing is written before the first row."""
        last = None if self.resume_from is None else step_of(self.resume_from)
        rows = [] if last is None else read_metrics(self.run_folder, last)
        purge = None if last is None else last + 1
        board = TensorBoardLogger(self.run_folder, name="", version="tensorboard", purge_step=purge)
        return [RunLogger(self.run_folder, rows), board]

    def before_fit(self) -> None:
        """Check everything that can be wrong, then make the folder."""
        self.datamodule.check_vocabulary(self.model.lm.config.vocab_size)
        self.model.check_trainer(self.trainer)
        self.datamodule.setup("fit")
        if not self.trainer.is_global_zero:
            return
        if self.resume_from is None:
            self._make_run_folder()
        for folder in (self.run_folder, *(path for path in self.run_folder.iterdir() if path.is_dir())):
            sweep(folder)
        if self.progress.bar:
            text = f"{self.model.lm.n_parameters():,} parameters; {self.datamodule.describe()}"
            self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _make_run_folder(self) -> None:
        self._dump_config()
        own = {"config", "overwrite", "resume", "trust_code", "run"}
        values = {k: v for k, v in self.config_dump.items() if k not in own} | {"run_dir": str(self.run_folder)}

        def fill(folder: Path) -> None:
            (folder / "config.yaml").write_text(dump_yaml(values), encoding="utf-8")

        # In one step: the run that it replaces is whole until then.
        write_folder(self.run_folder, fill, replace=self.config[self.subcommand].overwrite)

    def fit(self, **kwargs: Any) -> None:
        self.trainer.fit(**kwargs, ckpt_path=self.resume_from, weights_only=True)

    def after_fit(self) -> None:
        """The exported model first, then the last validation and the curve; where everything is."""
        trainer, run = self.trainer, self.run_folder
        step, bpb = trainer.global_step, trainer.callback_metrics.get("val/bpb")
        if trainer.is_global_zero:
            checkpoint.save(self.model.lm, run / "model", tokenizer=self.datamodule.tokenizer, overwrite=True)
        if self.progress.validated_step != step:
            values = trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            bpb = values[0]["val/bpb"] if values else None  # None with trainer.limit_val_batches 0
        if not trainer.is_global_zero:
            return
        gzip = self.datamodule.gzip_bits_per_byte("val")
        draw_curve(run, gzip)
        found = "no validation" if bpb is None else f"validation after {step} steps: {float(bpb):.3f} bits per byte"
        print(f"{found} (gzip -9 of the same text: {gzip:.3f})")
        print(f"trained for {self.progress.training_seconds:.0f} s; the run is in {run}, the model in {run}/model")

    def validate(self, **kwargs: Any) -> None:
        self._evaluate("validate", **kwargs)

    def test(self, **kwargs: Any) -> None:
        self._evaluate("test", **kwargs)

    def _evaluate(self, which: str, ckpt_path: str | None = None, **kwargs: Any) -> None:
        path = Path(ckpt_path) if ckpt_path else newest(self.run_folder / "checkpoints")
        if path is None or not path.is_file():
            where = path or f"in {self.run_folder}/checkpoints"
            raise UserError(f"there is no checkpoint {where}; give --run_dir or --ckpt_path")
        self.datamodule.check_vocabulary(self.model.lm.config.vocab_size)
        self.datamodule.setup(which)
        name = "val" if which == "validate" else "test"
        found = getattr(self.trainer, which)(**kwargs, ckpt_path=path, weights_only=True, verbose=False)
        if not found:
            raise UserError(f"trainer.limit_{name}_batches is 0, so nothing was read")
        (values,) = found
        gzip = self.datamodule.gzip_bits_per_byte(name)
        print(f"{name}: {values['val/bpb']:.4f} bits per byte of {path} (gzip -9 of the same text: {gzip:.4f})")


def check_run_folder(run: Path, *, overwrite: bool) -> None:
    """One sentence where a new run may not be written to a folder."""
    if not os.path.lexists(run):
        return
    if not overwrite:
        raise UserError(
            f"the run folder {run} exists; use --resume to go on, --overwrite to replace it or another --run_dir"
        )
    if not run.is_dir() or (any(run.iterdir()) and not (run / "config.yaml").is_file()):
        raise UserError(f"{run} holds no run of subquad, so --overwrite will not replace it")


def check_place(run: Path) -> None:
    """One sentence where no folder can be made."""
    parent = next(p for p in (run.absolute().parent, *run.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot make the run folder {run}: {parent} is no folder that may be written to")


def cannot_make(run: Path, error: OSError) -> UserError:
    return UserError(f"cannot make the run folder {run}: {error.strerror}")


def main(argv: Sequence[str]) -> int:
    """`subquad train ...`: returns the exit code; bad input raises UserError."""
    argv = list(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in SUBCOMMANDS:
        raise UserError(f"subquad train has no command {argv[0]!r}; {nearest(argv[0], SUBCOMMANDS)}")
    if not argv:
        raise UserError(f"subquad train needs a command: {', '.join(SUBCOMMANDS)}")
    quiet()
    run = run_folder_of(argv)
    TrainCLI.lock = None
    try:
        TrainCLI(
            LanguageModeling,
            TextData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "subquad train"},
            args=with_run_config(argv, run),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except Stopped as stop:
        if first_process():
            if stop.path is None:
                print("stopped before there was anything to save")
            else:
                folder = stop.path.parents[1]
                print(f"stopped; saved {stop.path}; go on with: subquad train fit --run_dir {folder} --resume")
        return 130
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise UserError(f"cannot write {error.filename or 'the run'}: {error.strerror}") from error
        raise
    finally:
        if TrainCLI.lock is not None:
            TrainCLI.lock.release()
    return 0


def run_folder_of(argv: list[str]) -> Path | None:
    """What --run_dir names on the command line, before anything is parsed."""
    for here, after in zip(argv, [*argv[1:], ""], strict=True):
        for option in ("--run_dir", "--run"):
            if here == option:
                return Path(after)
            if here.startswith(f"{option}="):
                return Path(here.removeprefix(f"{option}="))
    return None


def configurations(argv: list[str]) -> list[str]:
    """The files that --config names."""
    named = [after for option, after in pairwise(argv) if option in ("-c", "--config")]
    return named + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]


def with_run_config(argv: list[str], run: Path | None) -> list[str]:
    """The arguments with the run's own configuration where it is to be gone on with and none is given."""
    given = configurations(argv)
    for path in given:
        read_mapping(path)  # what it says to a file that it does not read is clearer than what the parser says
    goes_on = "--resume" in argv or argv[0] in ("validate", "test")
    if given or run is None or not goes_on:
        return argv
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no run: it has no config.yaml")
    own = run / "config.yaml"
    if "--trust_code" not in argv:
        check_run_config(read_mapping(own), own)
    return [argv[0], "--config", str(own), *argv[1:]]


def quiet() -> None:
    """Keep warnings that a user can act on; drop Lightning's advertisements, tips and notes."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in NOT_OURS_TO_HEED:
        warnings.filterwarnings("ignore", message=pattern)


def one_sentence(message: str, known: Sequence[str]) -> str:
    """jsonargparse's report of bad arguments, with the nearest key for an unknown one."""
    text = " ".join(message.split())
    if found := re.search(r"(?:[Uu]nrecognized arguments: --|not accept option ')([\w.+]+)", text):
        return f"there is no option {found[1]!r}; {nearest(found[1], known)}"
    if found := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)", text):
        return f"{found[1]} is missing; give a --config file that has it, or --{found[1]}"
    if found := re.search(r"File does not exist: '?([^']+)'?", text):
        return f"there is no configuration file {found[1]}"
    if found := re.search(r"Problems parsing config: (.*)", text):
        return found[1]
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    return re.sub(r"Parser key \"([^\"]+)\":", r"\1:", text)
