"""The command line: `capsfl train|sweep|ingest|phantom|predict|export|report|verify|ledger|epsilon|audit|...`."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as option
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capsfl.arguments import parse
from capsfl.ct.reader import ReaderConfig
from capsfl.settings import explain

# Heavy imports (jax, orbax, matplotlib) wait inside the commands, so that --help and mistakes answer at once.

SUMMARY = {
    "train": "CONFIG.toml [--dotted.name VALUE ...]   run or resume a study and write its page",
    "sweep": "CONFIG.toml [--dotted.name VALUE ...]   many studies in one program: privacy against utility",
    "ingest": "SOURCE OUT [--collection NAME] [--check] DICOM, NIfTI or pictures into standard volumes",
    "phantom": "OUT                                     chest-CT hospitals as real DICOM series",
    "predict": "RUN SCAN|FOLDER                         masks in each scan's own geometry, probabilities, pictures",
    "export": "RUN OUT                                 weights, programs and a model card to take away",
    "report": "RUN|SWEEP                               write the page of a study or a sweep again",
    "verify": "RUN [--witness HEAD]                    recompute and check every ledger of a study",
    "ledger": "show|prove|check|export|witness         read a run's ledger, take proofs of its rounds away",
    "epsilon": "--hospitals H --noise-multiplier Z ...  privacy loss of a setting, or the setting for a loss",
    "audit": "--noise-multiplier Z ...                canaries against our own rounds: a lower bound on epsilon",
    "bench": "[NAME] [--quick]                        measure time and memory on this machine",
    "doctor": "                                        what works on this machine and what to install",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; user errors end with one line on standard error and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        _print_summary()
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("capsfl"))
        return
    # Set before jax is imported, and inherited by worker processes: a second run compiles nothing again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder() / "jax"))
    # Orbax abandons its other threads and reads when one fails; their echo says no more than our line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            raise ValueError(f"capsfl: unknown command {words[0]!r}; one of {', '.join(COMMANDS)}")
        code = command(words[1:])
    except ValidationError as error:
        _fail(explain(error, f"capsfl {words[0]}"))
    except ValueError as error:
        _fail(_with_notes(str(error), error))
    except BrokenPipeError:
        # Whoever read our output has gone; what was asked for is done or needs no more words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno is None:
            _fail(_with_notes(str(error), error))
        place = f"{error.filename}: " if error.filename else ""
        _fail(_with_notes(f"{place}{error.strerror}; check the path, its permissions and the free space", error))
    except KeyboardInterrupt as error:
        _fail(_with_notes("interrupted; run the same command again to resume", error), code=130)
    sys.exit(code)


def train(words: list[str]) -> int:
    """Runs or resumes a study."""
    from capsfl.config import StudyConfig, choose_by_name, load_config

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            parse(
                StudyConfig,
                ["--help"],
                prog="capsfl train CONFIG.toml",
                description="Run or resume a study; a CONFIG.toml before --help shows its own values as defaults.",
                default=StudyConfig.example(),
                config=TYRO,
            )
        _fail("capsfl train: name a configuration first, such as configs/demo.toml")
    path = Path(words[0])

    class TrainCommand(StudyConfig):
        """A study, and how to run it this time."""

        profile: tyro.conf.UseCounterAction[int] = 0
        """Write a trace of a few rounds of the first arm into its folder, for TensorBoard, Perfetto or XProf."""

    given = parse(
        TrainCommand,
        words[1:],
        prog=f"capsfl train {path}",
        description=f"Run or resume the study of {path}; defaults below are the file's values.",
        default=TrainCommand(**dict(choose_by_name(load_config(path), words[1:]))),
        config=TYRO,
    )
    config = StudyConfig(**{field: getattr(given, field) for field in StudyConfig.model_fields})
    from capsfl.processes import is_first, joined
    from capsfl.study import disk_errors
    from capsfl.train import train as run_study

    with joined(config.devices), disk_errors(Path(config.out)):
        console = Console(quiet=not is_first())
        page = run_study(config, console=console, profile=given.profile > 0)
    console.print(f"page: {page}", soft_wrap=True, highlight=False)
    return 0


def sweep(words: list[str]) -> int:
    """Runs or resumes a sweep."""
    from capsfl.sweeps.config import SweepConfig, load_sweep

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            parse(
                SweepConfig,
                ["--help"],
                prog="capsfl sweep CONFIG.toml",
                description="Run or resume a sweep; a CONFIG.toml before --help shows its own values as defaults.",
                default=SweepConfig(),
                config=TYRO,
            )
        _fail("capsfl sweep: name a configuration first, such as configs/sweep_privacy.toml")
    path = Path(words[0])
    config = parse(
        SweepConfig,
        words[1:],
        prog=f"capsfl sweep {path}",
        description=f"Run or resume the sweep of {path}; defaults below are the file's values.",
        default=load_sweep(path),
        config=TYRO,
    )
    from capsfl.study import disk_errors
    from capsfl.sweeps.cores import one_device_per_core
    from capsfl.sweeps.run import run_sweep

    one_device_per_core()
    console = Console()
    with disk_errors(Path(config.out)):
        folder = run_sweep(config, console=console)
    console.print(f"page: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    return 0


@dataclass(frozen=True)
class IngestCommand:
    """Bring scans into standard volumes on disk (Zarr3), one per patient, continuing what is there already."""

    source: Annotated[Path, tyro.conf.Positional]
    """A manifest (CSV), a folder holding manifest.csv, a DICOM series folder, a NIfTI file, or a collection's top
    folder."""
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Folder for the volumes and index.csv, or its URL (s3://, gs://); with --check folder for the tables and pages, by
    default preflight."""
    check: bool = False
    """Store nothing: look at every series and write a table and a page for every hospital."""
    root: Path | None = None
    """Folder the manifest's paths start from; by default the manifest's own."""
    preset: Literal["tiny", "half", "full"] = "tiny"
    """128, 256 or 512 voxels a side."""
    window: Literal["fixed", "scanner"] = "fixed"
    """Window recorded for the models."""
    reader: ReaderConfig = option(default_factory=ReaderConfig)
    """What the readers may mend."""
    on_error: Literal["raise", "skip"] = "raise"
    """Stop at a scan that cannot be read, or leave it out by name."""
    processes: int | None = None
    """Scans read at once; by default one per core."""
    collection: str | None = None
    """What the folder is: covid-ct, covidx-ct, cc-19, mosmed, covid-19-ct-seg, sars-cov-2-ct, nifti-folder,
    image-folder, dicom-folder (any tree of series), or manifest. The options below need it."""
    hospitals: str | None = None
    """Who holds which patient: collection (its own sites), scanner, or drawn: even, dirichlet."""
    count: int | None = None
    """Hospitals of a draw; 3 when absent."""
    alpha: float | None = None
    """Concentration of dirichlet; 0.5 when absent, smaller is more skewed."""
    seed: int | None = None
    """Seed of drawn hospitals and splits."""
    split: str | None = None
    """official (the collection's lists where it has them), drawn, or study."""
    labels: str | None = None
    """disease (COVID against the rest) or all (every class)."""
    classes: tuple[str, ...] | None = None
    """Class folders in the order of their labels, the one without disease first."""
    patient_pattern: str | None = None
    """For image-folder: regular expression whose first group is the patient."""
    mask: str | None = None
    """lesion or lungs, where a collection has both."""
    mask_threshold: float | None = None
    """For nifti-folder: stored values from here on are inside the mask."""
    table: str | None = None
    """CSV beside the collection: patient, series or folder, and hospital, scanner, label, split."""
    pictures: str | None = None
    """For sars-cov-2-ct: CSV beside the collection with columns picture and patient."""
    leave_out: tuple[str, ...] | None = None
    """Patients to leave out, under the names that the preflight and the index give them."""
    series: str | None = None
    """Of a single folder that holds several series, which one: its number in the list or the end of its UID. With
    --collection, of a patient with several: largest or every."""
    side: int | None = None
    """Pixels along each side of a stored picture."""
    fit: str | None = None
    """How a picture becomes a square: stretch, crop or pad."""
    levels: str | None = None
    """standardized (every stored picture has the same mean and spread of grey) or kept."""


COLLECTION_OPTIONS = (
    *("hospitals", "count", "alpha", "seed", "split", "labels", "classes", "patient_pattern", "mask"),
    *("mask_threshold", "table", "pictures", "leave_out", "series", "side", "fit", "levels"),
)


def ingest(words: list[str]) -> int:
    """Brings scans into standard volumes, or looks at them first."""
    given = parse(IngestCommand, words, prog="capsfl ingest")
    from capsfl.ct.collections import CollectionConfig
    from capsfl.ct.ingest import ingest as ingest_scans
    from capsfl.ct.normalize import VolumeConfig

    options = {name: value for name in COLLECTION_OPTIONS if (value := getattr(given, name)) is not None}
    series = options.pop("series", None) if given.collection is None else None
    if options and given.collection is None:
        raise ValueError(f"{next(iter(options))}: only with --collection; say what the folder is")
    collection = None
    if given.collection is not None:
        chosen: Any = {"name": given.collection, **options}
        try:
            collection = CollectionConfig(**chosen)
        except ValidationError as error:
            raise ValueError(explain(error, "capsfl ingest").replace(": name = ", ": collection = ")) from None
    console = Console()
    if given.check:
        return _check_scans(given, collection, console)
    if given.out is None:
        raise ValueError("out: missing; name a folder for the volumes, or add --check to look at the scans only")
    report = ingest_scans(
        given.source,
        given.out,
        config=VolumeConfig(preset=given.preset, window=given.window),
        collection=collection,
        reader=given.reader,
        root=given.root,
        series=series,
        processes=given.processes,
        on_error=given.on_error,
    )
    console.print(f"{report.written} written, {report.kept} kept, {len(report.failed)} left out: {given.out}")
    for note in report.notes:
        console.print(f"  note: {note}", soft_wrap=True, highlight=False, markup=False)
    for name, fault in report.failed:
        console.print(f"  {name}: {fault}", soft_wrap=True, highlight=False, markup=False)
    return 3 if report.failed else 0


def _check_scans(given: IngestCommand, collection: Any, console: Console) -> int:
    """Looks at every series and writes a table and a page for each hospital."""
    from capsfl.ct.preflight import check
    from capsfl.report.preflight import print_preflight, write_preflight

    found = check(given.source, collection=collection, reader=given.reader, root=given.root, processes=given.processes)
    pages = write_preflight(found, Path(given.out or "preflight"))
    print_preflight(found, console)
    for page in pages:
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    return 3 if any(not finding.accepted for finding in found.findings) else 0


def phantom(words: list[str]) -> int:
    """Writes phantom hospitals."""
    from capsfl.ct.phantom import PhantomConfig, write_hospitals

    class PhantomCommand(PhantomConfig):
        """Write seeded chest-CT hospitals as real DICOM series with lesion masks and a manifest."""

        out: Annotated[Path, tyro.conf.Positional]
        """Folder for the series, masks/ and manifest.csv."""
        processes: int | None = None
        """Patients rendered at once; by default one per core."""

    given = parse(PhantomCommand, words, prog="capsfl phantom")
    config = PhantomConfig(**given.model_dump(exclude={"out", "processes"}))
    manifest = write_hospitals(given.out, config=config, processes=given.processes)
    print(f"manifest: {manifest}")
    return 0


def predict(words: list[str]) -> int:
    """Applies a study to scans."""
    from capsfl.ct.reader import ReaderConfig

    @dataclass(frozen=True)
    class PredictCommand:
        """Apply a trained study to one scan or a folder tree of many: masks in each scan's own geometry, probabilities.

        Exit code 3 when some series were left out. Folders of results are named after the scans' folders; name those
        by pseudonyms if you share the page.
        """

        run: Annotated[Path, tyro.conf.Positional]
        """Folder that `capsfl train` wrote."""
        scan: Annotated[Path, tyro.conf.Positional]
        """A DICOM series, a NIfTI file, or a folder tree of many."""
        out: Path | None = None
        """Where results go, a folder per series; by default RUN/predictions, from where the study's page shows them."""
        series: str | None = None
        """The only series to predict: its number in the folder, its SeriesInstanceUID or the ending of that."""
        formats: tuple[Literal["nifti", "seg", "png"], ...] | None = None
        """What is written; by default all, SEG where `pip install 'capsfl[seg]'` was done."""
        identified: bool = False
        """Copy the patient's identity from the scan into the DICOM SEG, as an archive needs it to file the SEG beside
        the scan; the file is then as confidential as the scan. Without, it carries a pseudonym."""
        scanner: str | None = None
        """The scanner of the paper's Table II that made the scans (A1, A2, B3, B4, C5, C6), for a study trained with
        data.volumes.window = "scanner"; by default the scan's own tags tell."""
        reader: ReaderConfig = option(default_factory=ReaderConfig)
        """What the reader may mend."""

    given = parse(PredictCommand, words, prog="capsfl predict")
    from capsfl.predict.run import predict as predict_scans
    from capsfl.study import disk_errors

    console = Console()
    options = {name: getattr(given, name) for name in ("out", "series", "formats", "identified", "scanner", "reader")}
    with disk_errors(given.out or given.run):
        place, left_out = predict_scans(given.run, given.scan, console=console, **options)
    console.print(f"written: {place}", soft_wrap=True, highlight=False)
    return 3 if left_out else 0


@dataclass(frozen=True)
class ExportCommand:
    """Take a study's models away: weights (safetensors), programs that need no capsfl (StableHLO), a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """A new folder for the models."""


def export(words: list[str]) -> int:
    """Writes a study's models into a folder that stands on its own."""
    given = parse(ExportCommand, words, prog="capsfl export")
    from capsfl.export.run import export_models
    from capsfl.study import disk_errors

    with disk_errors(given.out):
        print(f"model card: {export_models(given.run, given.out) / 'MODEL_CARD.md'}")
    return 0


@dataclass(frozen=True)
class ReportCommand:
    """Write the page of a study or a sweep again from what is in its folder; works while it is still running."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` or `capsfl sweep` wrote."""
    picture: Path | None = None
    """Also draw a study's summary picture (PNG) here; a sweep's frontier lies in its folder."""


def report(words: list[str]) -> int:
    """Writes the page again."""
    given = parse(ReportCommand, words, prog="capsfl report")
    from capsfl.report import build_page, build_sweep_page, summary_picture
    from capsfl.study import disk_errors

    if (given.run / "sweep.json").exists():
        from capsfl.sweeps.results import merge_results

        with disk_errors(given.run):
            merge_results(given.run)
            print(f"page: {build_sweep_page(given.run)}")
        return 0
    with disk_errors(given.run):
        print(f"page: {build_page(given.run)}")
    if given.picture is not None:
        with disk_errors(given.picture):
            summary_picture(given.run, given.picture)
        print(f"picture: {given.picture}")
    return 0


@dataclass(frozen=True)
class VerifyCommand:
    """Recompute every digest, epsilon and signature of a study; exit code 1 when anything differs."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` wrote."""
    witness: Path | None = None
    """A copy of one run's ledger/head, kept elsewhere: only against it can a rollback show."""
    strict: bool = False
    """Exit with 1 also on warnings and where something could not be verified that should be; what lies with others by
    design, a witness, voters or hospitals, aside."""
    json: bool = False
    """Print findings as JSON."""


def verify(words: list[str]) -> int:
    """Checks a study's ledgers."""
    given = parse(VerifyCommand, words, prog="capsfl verify")
    from capsfl.audit import audit_study, finding_row
    from capsfl.ledger.verify import Status

    witness = given.witness.read_bytes() if given.witness else None
    findings = audit_study(given.run, witness_head=witness)
    failed = [(name, f) for name, rows in findings.items() for f in rows if f.status is Status.FAILED]
    doubtful = (Status.UNVERIFIABLE, Status.WARNING)
    open_ = [f for rows in findings.values() for f in rows if f.doubtful]
    code = 1 if failed or (given.strict and open_) else 0
    if given.json:
        rows = {name: [finding_row(f) for f in rows] for name, rows in findings.items()}
        print(json.dumps({"ok": not code, "runs": rows}, indent=1))
        return code
    console = Console()
    table = Table("run", "check", "OK", "warning", "unverifiable", "FAILED", box=None, pad_edge=False)
    for name, rows in findings.items():
        for check in dict.fromkeys(f.check for f in rows):
            found = [f.status for f in rows if f.check == check]
            counts = [str(found.count(s) or "-") for s in (Status.OK, *doubtful[::-1], Status.FAILED)]
            table.add_row(name, check, *counts)
    console.print(table)
    for name, finding in failed:
        moment = f"{finding.task} round {finding.round}" if finding.round is not None else ""
        where = [finding.check, moment, finding.leaf or ""]
        console.print(
            f"[red]FAILED[/] {name}: {escape(' '.join(w for w in where if w))}: {escape(finding.detail)}",
            soft_wrap=True,
            highlight=False,
        )
    for status in doubtful[::-1]:
        details = {f.detail for rows in findings.values() for f in rows if f.status is status}
        for detail in sorted(details)[:10]:
            console.print(f"{status.value}: {detail}", soft_wrap=True, highlight=False, markup=False)
    if not failed:
        console.print("[green]verified[/]: everything that can be recomputed agrees with the ledgers")
        if code:
            console.print("[red]strict[/]: something could not be recomputed, or is not as it was (above)")
    return code


def ledger(words: list[str]) -> int:
    """Reads a run's ledger, or takes parts of it away."""
    from capsfl.ledger_command import ledger as run_action

    return run_action(words)


@dataclass(frozen=True)
class EpsilonCommand:
    """Privacy loss of a setting, or with --target-epsilon the setting that meets one; under both relations."""

    hospitals: int | None = None
    """H, hospitals in the federation; for unit hospital."""
    patients: int | None = None
    """N, patients of one hospital; for unit patient."""
    cohort: int | None = None
    """m, expected hospitals in a round (all when absent), or expected patients in a local step."""
    noise_multiplier: float | None = None
    """z, standard deviation of the noise on the SUM over the clip norm; absent to solve for it."""
    rounds: int | None = None
    """T, rounds; absent to solve for it."""
    epochs: int | None = None
    """Local epochs in a round, of ceil(N / m) steps each; for unit patient; 1 when absent."""
    delta: float = 1e-5
    """Probability with which the bound may fail."""
    sampler: Literal["poisson", "fixed", "all", "cyclic"] = "poisson"
    """How a cohort is drawn; patients are drawn by poisson."""
    truncation: int | None = None
    """The most that a Poisson draw takes; the smallest cap costing < 0.1 % of epsilon when absent."""
    unit: Literal["hospital", "patient"] = "hospital"
    """Whom the guarantee protects: a hospital in the federation, or a patient of one hospital."""
    target_epsilon: float | None = None
    """Solve for the one of --noise-multiplier, --rounds that is absent (both given: for the cohort)."""
    json: bool = False
    """Print flat JSON."""


def epsilon(words: list[str]) -> int:
    """Accounts for a setting."""
    given = parse(EpsilonCommand, words, prog="capsfl epsilon")
    row = _account_for_patients(given) if given.unit == "patient" else _account_for_hospitals(given)
    if given.json:
        print(json.dumps(row))
        return 0
    beside = Table("neighbours", "epsilon", box=None, pad_edge=False)
    headline, other = row["relation"], row["other_relation"]
    for relation in (headline, other):
        figure = row[f"epsilon_{relation}"]
        beside.add_row(relation.replace("_", " "), "unbounded" if figure is None else f"{figure:.6g}")
    Console().print(beside)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in row.items():
        table.add_row(name, "unbounded" if value is None and "epsilon" in name else str(value))
    Console().print(table)
    return 0


def _account_for_hospitals(given: EpsilonCommand) -> dict[str, Any]:
    from capsfl.privacy import epsilon_report, epsilon_under_both_relations, solve

    if given.hospitals is None:
        raise ValueError("hospitals: missing; give --hospitals, or --unit patient and --patients")
    _refuse_options(given, ("patients", "epochs"), unit="patient")
    unknown = _unknown(given, cohort="cohort")
    values: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("hospitals", "cohort", "noise_multiplier", "rounds", "delta", "sampler", "truncation")
    }
    if unknown != "cohort":
        values["cohort"] = given.hospitals if given.cohort is None else given.cohort
    if unknown is None or given.target_epsilon is None:
        row = epsilon_report(**values)
    else:
        del values[unknown]
        row = solve(given.target_epsilon, for_=unknown, **values)
    return row | epsilon_under_both_relations(row)


def _account_for_patients(given: EpsilonCommand) -> dict[str, Any]:
    from capsfl.privacy.patient_report import patient_report, solve_patients

    if given.patients is None:
        raise ValueError("patients: missing; give --patients, how many the hospital has")
    _refuse_options(given, ("hospitals",), unit="hospital")
    if given.sampler != "poisson":
        raise ValueError(f'sampler = {given.sampler}: patients are drawn by "poisson"; leave it out')
    unknown: Any = _unknown(given, cohort="expected_patients")
    if unknown != "expected_patients" and given.cohort is None:
        raise ValueError("cohort: missing; give --cohort, the patients expected in a local step")
    values: dict[str, Any] = {
        name: getattr(given, name) for name in ("patients", "noise_multiplier", "rounds", "delta")
    }
    epochs = 1 if given.epochs is None else given.epochs
    values |= {"expected_patients": given.cohort, "epochs": epochs, "truncation": given.truncation}
    if unknown is None or given.target_epsilon is None:
        return patient_report(**values)
    del values[unknown]
    return solve_patients(given.target_epsilon, for_=unknown, **values)


def _unknown(given: EpsilonCommand, *, cohort: str) -> Any:
    """What is to be solved for, None for epsilon; `cohort` is that field's name in the answer."""
    missing = [name for name in ("noise_multiplier", "rounds") if getattr(given, name) is None]
    if given.target_epsilon is None:
        for name in missing:
            flag = name.replace("_", "-")
            raise ValueError(f"{name}: missing; give --{flag}, or --target-epsilon to solve for it")
        return None
    if len(missing) == 2:
        raise ValueError("noise_multiplier, rounds: both missing; give one, and the other is solved for")
    if missing:
        return missing[0]
    if given.cohort is not None:
        raise ValueError(
            f"cohort = {given.cohort}: given, as are noise-multiplier and rounds; leave one out to solve for it"
        )
    return cohort


def _refuse_options(given: EpsilonCommand, fields: tuple[str, ...], *, unit: str) -> None:
    for field in fields:
        if getattr(given, field) is not None:
            raise ValueError(f"{field} = {getattr(given, field)}: of unit {unit}; leave it out, or give --unit {unit}")


@dataclass(frozen=True)
class AuditCommand:
    """Attack this engine's own rounds with canaries: a lower bound on epsilon against the claimed one.

    Exit code 1 when the bound refutes the claim.
    """

    noise_multiplier: float
    """z, standard deviation of the noise on the SUM over the clip norm."""
    clip_norm: float = 1.0
    """S, the L2 norm an update is clipped to."""
    sampler: Literal["all", "poisson"] = "all"
    """How a cohort is drawn."""
    cohort: int | None = None
    """m, expected canaries in a round; all when absent."""
    delta: float = 1e-5
    """Probability with which the claimed bound may fail."""
    canaries: int = 1000
    """Hospitals with a known update, each in or out by a coin; at least 1000."""
    rounds: int = 1
    """Rounds released."""
    confidence: float = 0.95
    """Of the lower bound."""
    seed: int = 0
    """Of coins, directions and noise."""
    json: bool = False
    """Print flat JSON."""


def audit(words: list[str]) -> int:
    """Attacks the engine's privacy."""
    given = parse(AuditCommand, words, prog="capsfl audit")
    from capsfl.federated.canaries import AuditConfig, audit_privacy
    from capsfl.privacy.plan import PrivacyConfig

    values = asdict(given)
    chosen = {name: values.pop(name) for name in ("noise_multiplier", "clip_norm", "sampler", "cohort", "delta")}
    del values["json"]
    found = audit_privacy(PrivacyConfig(**chosen), config=AuditConfig(**values))
    if given.json:
        print(json.dumps(found))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in found.items():
            table.add_row(name, str(value))
        Console().print(table)
    return 1 if found["verdict"] == "refuted" else 0


def bench(words: list[str]) -> int:
    """Measures on this machine."""
    from capsfl.bench import BENCHMARKS
    from capsfl.bench.command import Output, finish, list_benchmarks, redraw, say
    from capsfl.bench.machine import results_folder

    if not words or words[0] in ("-h", "--help"):
        list_benchmarks()
        return 0
    if words[0] not in BENCHMARKS:
        raise ValueError(f"capsfl bench: unknown benchmark {words[0]!r}; one of {', '.join(BENCHMARKS)}")
    prog = f"capsfl bench {words[0]}"
    if words[0] != "routing":
        form, measure = _load_benchmark(words[0])

        @dataclass(frozen=True)
        class Command(Output, form):
            pass

        Command.__doc__ = form.__doc__
        given = parse(Command, words[1:], prog=prog)
        results_folder(given.out)
        finish(measure(given, say=say), given)
        return 0
    from capsfl.bench.routing import RoutingBench
    from capsfl.bench.routing import measure as measure_routing
    from capsfl.bench.tuning import tune

    @dataclass(frozen=True)
    class RoutingCommand(RoutingBench, Output):
        """Measure every capsule operator, each implementation beside the others and torch where it is there."""

        table: bool = False
        """Measure nothing: write the page and the pictures again from the results."""
        tune: bool = False
        """Instead, find the fastest block sizes and record them for later runs."""

    given = parse(RoutingCommand, words[1:], prog=prog)
    if given.tune:
        found = list(tune(quick=given.quick, say=say))
        if given.json:
            print(json.dumps(found))
        return 0
    folder = results_folder(given.out)
    if given.table:
        redraw(folder)
        return 0
    finish(measure_routing(given, say=say), given)
    return 0


def _load_benchmark(name: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """The options of a benchmark and what measures it."""
    match name:
        case "segcaps":
            from capsfl.bench.segcaps import SegCapsBench, measure

            return SegCapsBench, measure
        case "scale":
            from capsfl.bench.scale import ScaleBench, measure

            return ScaleBench, measure
        case "sweep":
            from capsfl.bench.sweep import SweepBench, measure

            return SweepBench, measure
        case "rounds":
            from capsfl.bench.rounds import RoundsBench, measure

            return RoundsBench, measure
        case "ledger":
            from capsfl.bench.ledger import LedgerBench, measure

            return LedgerBench, measure
        case "ingest":
            from capsfl.bench.ingest import IngestBench, measure

            return IngestBench, measure
        case "mnist":
            from capsfl.bench.mnist import MnistBench, measure

            return MnistBench, measure
        case "segmenters":
            from capsfl.bench.segmenters import SegmentersBench, measure

            return SegmentersBench, measure
        case _:
            from capsfl.bench.geyer import GeyerBench, measure
            from capsfl.sweeps.cores import one_device_per_core

            def on_every_core(options: Any, **others: Any) -> dict[str, Any]:
                one_device_per_core()
                return measure(options, **others)

            return GeyerBench, on_every_core


def doctor(words: list[str]) -> int:
    """Says what works here."""

    @dataclass(frozen=True)
    class DoctorCommand:
        """Devices, versions, decoders and extras: what works here and what to install."""

    parse(DoctorCommand, words, prog="capsfl doctor")
    from capsfl.doctor import examine

    table = Table("part", "state", "remedy", box=None, pad_edge=False)
    rows = examine()
    for row in rows:
        table.add_row(row.part, f"[green]{row.state}[/]" if row.works else f"[red]{row.state}[/]", row.remedy)
    Console().print(table)
    return 0 if all(row.works or row.optional for row in rows) else 1


TYRO = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "sweep": sweep,
    "ingest": ingest,
    "phantom": phantom,
    "predict": predict,
    "export": export,
    "report": report,
    "verify": verify,
    "ledger": ledger,
    "epsilon": epsilon,
    "audit": audit,
    "bench": bench,
    "doctor": doctor,
}


def _print_summary() -> None:
    console = Console()
    console.print("[bold]capsfl[/] capsule networks for lung CT, trained federated with differential privacy\n")
    for name, text in SUMMARY.items():
        console.print(f"  capsfl {name:<8} {text}", highlight=False, markup=False, soft_wrap=True)
    console.print("\nEach command has its own --help.")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsfl"


def _with_notes(message: str, error: BaseException) -> str:
    """A message with what was noted on its error: another one, which came up meanwhile."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _fail(message: str, *, code: int = 2) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
