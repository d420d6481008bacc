"""The rounds of one stage of a run, each followed by a signed record and a checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax

from capsfl.checkpoint import open_checkpoints
from capsfl.clock import Stopwatch
from capsfl.curves import MetricsLog
from capsfl.federated.devices import on_one_device
from capsfl.federated.federation import Federation, RoundsConfig, draws_noise
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.recorded import recall_chunk, record_choice
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.privacy.plan import PrivacyPlan
from capsfl.processes import in_turn
from capsfl.profiling import CompileWatch, RoundTrace, part
from capsfl.recording import RoundKeeper, one_behind
from capsfl.training.founding import open_run_secret
from capsfl.training.run import Run


def run_rounds(
    run: Run,
    task: Task,
    stage: RoundsConfig,
    records: Mapping[str, Any],
    validation: Mapping[str, Any],
    ledger: Ledger | None,
    metrics: MetricsLog,
    trace: RoundTrace,
    *,
    plan: PrivacyPlan,
    rounds_before: int,
) -> tuple[Any, dict[str, Any], int]:
    """Runs the rounds of one stage, each followed by a signed record and a checkpoint.

    All processes run the rounds and save the checkpoints; the ledger's keeper alone scores and records them.

    Returns:
        The server's last weights, those of hospitals that have their own (`stage.batch_norm`), and how many rounds the
        run has spent privacy on so far.
    """
    config = run.config
    federation = Federation(
        task,
        run.arrange(records, task.name),
        config=stage,
        privacy=config.privacy,
        devices=recall_chunk(run.folder, task.name, config.devices),
        seed=config.seed,
        stream=run.chain_id if draws_noise(config.privacy) else run.place,
        secret=in_turn("the secret of the noise", lambda: open_run_secret(run)),
        plan=plan,
        keep_updates=config.consensus is not None,
    )
    del records  # those on disk need not stay in memory
    held_out = stack_hospitals(validation) if validation else None
    total = stage.rounds
    if config.privacy.target_epsilon is not None:
        total = min(total, plan.max_rounds(config.privacy.target_epsilon) - rounds_before)
    state = federation.init()
    with (
        open_checkpoints(run.folder / "checkpoints" / task.name, keep=config.keep_checkpoints) as checkpoints,
        one_behind(threaded=jax.process_count() == 1) as behind,
    ):
        keeper = RoundKeeper(config, task.name, run.folder, ledger, metrics, checkpoints, plan, federation.fingerprint)
        if (kept := keeper.resume(state)) is not None:
            state = federation.place(kept)
        with trace.rounds(task.name, range(int(state.round) + 1, total + 1)) as numbers:
            for _ in numbers:
                watch, compiling = Stopwatch(), CompileWatch()
                with part("train the cohort"):
                    state, report = federation.step(state)
                scores = {}
                if ledger is not None:
                    record_choice(run.folder, task.name, federation.choice)
                    with part("evaluate"):
                        scores = federation.evaluate(state, held_out) if held_out else {}
                figures = watch.read() | compiling.read()
                behind(keeper.keep, state, report, scores, figures, rounds_before + int(state.round))
    own = {} if state.statistics is None else {name: federation.weights_of(state, name) for name in run.holders}
    return on_one_device(state.parameters), on_one_device(own), rounds_before + int(state.round)
