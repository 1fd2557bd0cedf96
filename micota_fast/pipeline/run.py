"""`micota run`: runs the stages that are missing or stale, and resumes after being killed at any point.

A stage is done if its folder contains a `done.json` whose identity (options and contents of inputs, not timestamps) is
the one wanted now, and its outputs still have the contents recorded there. A folder made for another identity is
renamed to NAME~FINGERPRINT, never deleted, and comes back when a recipe wants it again. Parts of it that do not depend
on what has changed (`Stage.lasting`), such as the answers to the other benchmarks of an evaluation, are copied to the
new folder.
"""

import contextlib
import glob
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from micota_fast.common.files import open_atomic, reading, remove_whole, whole_folder, write_atomic, writing
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.common.importing import imported
from micota_fast.common.json_io import as_read_back, write_json
from micota_fast.common.lock import RUN_ENDS_S, locked
from micota_fast.common.urls import hide_credentials
from micota_fast.config import loader
from micota_fast.config.recipe import LaunchConfig, Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.closing import closing
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.process import StageProcess
from micota_fast.pipeline.prompt_agreement import prompt_differences
from micota_fast.pipeline.record import (
    DONE,
    MAKING,
    made_for,
    read_done,
    read_making,
    set_aside_name,
    what_differs,
)
from micota_fast.pipeline.stage import Artefact, Lasting, Stage
from micota_fast.pipeline.stages import VERBS
from micota_fast.pipeline.time_left import TimeLeft
from micota_fast.pipeline.versions import versions

POLL_S = 0.05
TRAINED_PARAMETERS = "micota_fast.planning.trained_parameters:check_trained_parameters"


@dataclass(frozen=True)
class Status:
    """What is left to do for a stage, and why."""

    state: Literal["done", "stale", "partial", "to do", "waits"]
    why: str = ""
    identity: dict[str, Any] | None = None  # None: unknown while a stage it needs is not done


def run_recipe(recipe: Recipe, path: Path, folder: Path, dry_run: bool = False) -> None:
    """Run the stages of a recipe that are missing or stale, and print the result in a small table.

    Args:
        recipe: loaded from `path`.
        path: of the recipe.
        folder: of the run.
        dry_run: only print which inputs do not exist, each stage's state, and the commands that would run.

    Raises:
        InputError: the recipe is wrong, an input does not exist, a stage failed, or another run uses the folder.
    """
    absent: list[str] = []
    run = Run(build_stages(recipe, path, folder, absent if dry_run else None), recipe.launch, folder)
    for what in absent:
        print(f"missing: {what}")
    imported(TRAINED_PARAMETERS)(run.stages)
    statuses = run.statuses()
    for difference in prompt_differences(run.stages):
        print(f"WARNING: {difference}")
    open_stages = [name for name, status in statuses.items() if status.state != "done"]
    if dry_run:
        width = max(map(len, statuses))
        for stage in run.stages:
            status = statuses[stage.name]
            print(f"{stage.name:{width}}  {status.state:8}  {status.why}".rstrip())
            if status.state != "done":
                print(f"    {shlex.join(run.command(stage))}")
        print(f"{len(statuses) - len(open_stages)} of {len(statuses)} stages done; folder: {folder}", flush=True)
        if absent:  # a dry run shows the stages all the same
            raise InputError(f"the run cannot start: {len(absent)} missing, listed above the stages")
        return
    if open_stages:
        print(f"{len(open_stages)} of {len(statuses)} stages to do in {folder}")
        with contextlib.closing(TimeLeft(run.stages, recipe.launch)) as time_left:
            run.run(lambda line: print(line, flush=True), time_left)
        print()
    print(closing(folder, recipe.seeds[0]))


class Run:
    """Stages in one folder.

    Args:
        stages: each after those it needs (`graph.build_stages`).
        launch: how many run at once, with how many processes and threads.
        folder: of the artefacts, one sub-folder per stage.
    """

    def __init__(self, stages: Sequence[Stage], launch: LaunchConfig, folder: Path) -> None:
        self.stages, self.launch, self.folder = list(stages), launch, folder
        self.fingerprints = Fingerprints(folder / "fingerprints.json")

    def statuses(self) -> dict[str, Status]:
        """Return the state of every stage, in order; changes nothing.

        Raises:
            InputError: the folder cannot be read, or a done.json or making.json in it is damaged.
        """
        found: dict[str, Status] = {}
        with reading(self.folder):
            for stage in self.stages:
                found[stage.name] = self._status(stage, {name: found[name].state for name in stage.needs})
            if self.folder.is_dir():
                self.fingerprints.save()
        return found

    def run(self, say: Callable[[str], None], time_left: TimeLeft | None = None) -> None:
        """Run all stages that are not done. Can be killed at any moment and called again.

        Args:
            say: is given each line of what happens.
            time_left: says with each finished stage how long the rest takes; None: nothing does.

        Raises:
            InputError: a stage failed (its log's end is in the message), or another run uses the folder.
        """
        with locked(self.folder / ".lock", "run", RUN_ENDS_S, say) as lock, writing(self.folder):
            self._run_all(lock.fileno(), say, time_left)

    def command(self, stage: Stage) -> list[str]:
        """Return the command that starts a stage; its configuration is written just before that."""
        return VERBS[stage.verb].command(
            stage.verb, stage.settings, self.folder / stage.name / "config.yaml", self.launch
        )

    # --- what is done ---

    def _status(self, stage: Stage, needed: dict[str, str]) -> Status:
        folder = self.folder / stage.name
        record = read_done(folder)
        if any(state != "done" for state in needed.values()):
            waits_for = [name for name, state in needed.items() if state != "done"]
            return Status("waits" if record else "to do", f"after {', '.join(waits_for)}")
        identity = self._identity(stage)
        if record is None:
            making = read_making(folder)
            if making is None:
                return Status("to do", identity=identity)
            if making.identity == identity:
                return Status("partial", "resumes", identity)
            return Status("stale", what_differs(making, identity), identity)
        if record.identity != identity:
            return Status("stale", what_differs(record, identity), identity)
        for name, digest in record.outputs.items():
            if not (folder / name).exists():
                return Status("stale", f"its output {name} is gone", identity)
            if self.fingerprints.of(folder / name) != digest:
                return Status("stale", f"its output {name} was changed", identity)
        return Status("done", f"{record.seconds:.0f} s", identity)

    def _identity(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage's result depends on, without the paths of anything."""
        contents = {artefact.location: self._content(artefact) for artefact in stage.inputs}
        places = contents | {str(self.folder): "RUN"}
        # A place ends where its name ends: /models/qwen is not the beginning of /models/qwen-long.
        longest_first = sorted(places, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})(?![\\w.+~-])")

        def placeless(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placeless(item) for key, item in value.items()}
            if isinstance(value, list):
                return [placeless(item) for item in value]
            return pattern.sub(lambda found: places[found[0]], value) if isinstance(value, str) else value

        identity = {
            "verb": stage.verb,
            "options": placeless(loader.identity(stage.settings)),
            "inputs": list(contents.values()),
        }
        if stage.files:  # parsed: YAML folds or escapes a path by its length and characters
            parsed = {name: placeless(yaml.safe_load(text)) for name, text in stage.files.items()}
            identity["files"] = {name: yaml.safe_dump(content, sort_keys=False) for name, content in parsed.items()}
        return dict(as_read_back(identity))

    def _content(self, artefact: Artefact) -> str:
        if artefact.on_hub:
            return f"hub:{artefact.location}"
        return f"sha256:{self.fingerprints.of(Path(artefact.location))}"

    # --- running the rest ---

    def _run_all(self, lock: int, say: Callable[[str], None], time_left: TimeLeft | None) -> None:
        depth = _depths(self.stages)
        done: dict[str, float] = {}  # name -> seconds that it took
        running: dict[str, StageProcess] = {}
        failed: StageProcess | None = None
        waiting = list(self.stages)
        try:
            while waiting or running:
                for stage in sorted(waiting, key=lambda stage: -depth[stage.name]):
                    if failed or len(running) >= self.launch.jobs or not all(name in done for name in stage.needs):
                        continue
                    waiting.remove(stage)
                    status = self._status(stage, {})
                    restored = status.state != "done" and self._prepare(stage, status)
                    if restored:
                        status = self._status(stage, {})
                        if status.state == "done":
                            say(f"{stage.name}: restored, as an earlier run made it")
                        else:  # what came back is damaged, or was never finished
                            self._prepare(stage, status)
                    if status.state == "done":
                        record = read_done(self.folder / stage.name)
                        assert record is not None
                        done[stage.name] = record.seconds
                        continue
                    folder = self.folder / stage.name
                    command, results = self.command(stage), VERBS[stage.verb].results
                    running[stage.name] = StageProcess(stage, folder, command, self.launch, lock, results)
                    say(f"[{len(done)}/{len(self.stages)}] {stage.name}: {_reason(status)}")
                for name, process in list(running.items()):
                    code = process.poll(say)
                    if code is None:
                        continue
                    del running[name]
                    if code == 0:
                        self._finish(process)
                        done[name] = process.seconds()
                        left = ""
                        if time_left is not None and len(done) < len(self.stages):
                            left = time_left.words(done, {one: of.seconds() for one, of in running.items()})
                        say(f"[{len(done)}/{len(self.stages)}] {name}: done in {done[name]:.1f} s{left}")
                    else:
                        failed = process
                        say(f"{name}: FAILED with status {code}; its log: {process.log}")
                if failed and not running:
                    raise InputError(failed.failure())
                if running:
                    time.sleep(POLL_S)
        finally:
            for process in running.values():
                process.stop()
            self.fingerprints.save()

    def _prepare(self, stage: Stage, status: Status) -> bool:
        """Make the stage's folder ready: keep what was begun for this identity, set aside anything else.

        Returns:
            Whether a folder that had been set aside for this identity is back, so that its status must be read again.

        Raises:
            InputError: the folder contains files that are not ours.
        """
        folder, identity = self.folder / stage.name, status.identity
        assert identity is not None
        there = made_for(folder)
        if there is None and folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise InputError(f"{folder} contains files that no run has made; choose another --out, or move them away")
        if there is not None and there != identity:
            aside = set_aside_name(folder, there)
            remove_whole(aside)
            folder.rename(aside)
        elif there is not None and status.state == "stale":
            self._clear(stage, folder, identity)  # made for this identity, and damaged since
        wanted = set_aside_name(folder, identity)
        if not folder.exists() and wanted.exists():
            wanted.rename(folder)
            return True
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MAKING, {"identity": identity})
        write_atomic(folder / "config.yaml", [loader.dump(stage.settings).encode()])
        for name, text in stage.files.items():
            write_atomic(folder / name, [text.encode()])
        self._take_over(stage, folder, identity)
        return False

    def _clear(self, stage: Stage, folder: Path, identity: dict[str, Any]) -> None:
        """Remove what the stage has made, except the parts that last, which the stage checks itself."""
        if not stage.lasting:
            remove_whole(folder)
            return
        write_json(folder / MAKING, {"identity": identity})
        (folder / DONE).unlink(missing_ok=True)
        kept = {MAKING} | {Path(name).parts[0] for part in stage.lasting for name in part.names}
        for file in folder.iterdir():
            if file.name not in kept:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _take_over(self, stage: Stage, folder: Path, identity: dict[str, Any]) -> None:
        """Copy to the stage's folder the parts that last of former ones; resumes if it was killed."""
        formers = folder.parent.glob(f"{glob.escape(folder.name)}~*")
        in_order = sorted(formers, key=lambda path: (not (path / DONE).exists(), path))
        kept_from = [(former, theirs) for former in in_order if (theirs := made_for(former)) is not None]
        for part in stage.lasting:
            wanted = _what_counts(identity, part)
            for former, theirs in kept_from:
                names = [name for name in part.names if (former / name).exists()]
                if names and _what_counts(theirs, part) == wanted:
                    for name in names:
                        if not (folder / name).exists():
                            _copy(former / name, folder / name)
                    break

    def _finish(self, process: StageProcess) -> None:
        stage, folder = process.stage, process.folder
        missing = [name for name in stage.outputs if not (folder / name).exists()]
        if missing:
            raise InputError(
                f"stage {stage.name} ended before it was finished, without {', '.join(missing)}; its log: "
                f"{process.log}. Run the same command to resume"
            )
        making = read_making(folder)
        assert making is not None
        # It was needed to reach a server; what stays is passed around.
        options = (folder / "config.yaml").read_text(encoding="utf-8")
        if (shown := hide_credentials(options)) != options:
            write_atomic(folder / "config.yaml", [shown.encode()])
        record = {
            "stage": stage.name,
            "command": process.command,
            "identity": making.identity,
            "outputs": {name: self.fingerprints.of(folder / name) for name in stage.outputs},
            "versions": versions(),
            "seconds": round(process.seconds(), 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(folder / DONE, record)
        self.fingerprints.save()


def _depths(stages: Sequence[Stage]) -> dict[str, int]:
    """Return the number of stages from each one to the last that needs it: the longest chain is started first."""
    depth = {stage.name: 0 for stage in stages}
    for stage in reversed(stages):
        for name in stage.needs:
            depth[name] = max(depth[name], depth[stage.name] + 1)
    return depth


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder such that it appears whole or not at all."""
    if source.is_dir():
        with whole_folder(target) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        return
    with source.open("rb") as read, open_atomic(target) as written:
        shutil.copyfileobj(read, written)


def _what_counts(identity: dict[str, Any], part: Lasting) -> dict[str, Any]:
    """Return the verb and the options of an identity that a part depends on.

    The contents of inputs stand in the options in place of their paths, so they count if their option does.
    """

    def removed(value: Any, path: list[str]) -> Any:
        if isinstance(value, list):
            return [removed(item, path) for item in value]
        if not isinstance(value, dict) or path[0] not in value:
            return value
        if len(path) == 1:
            return {key: item for key, item in value.items() if key != path[0]}
        return value | {path[0]: removed(value[path[0]], path[1:])}

    rest = identity.get("options")
    if part.item is not None and isinstance(rest, dict) and isinstance(rest.get(part.item[0]), list):
        option, name = part.item
        items = [item for item in rest[option] if isinstance(item, dict) and item.get("name") == name]
        rest = rest | {option: items}
    for option in part.ignored:
        rest = removed(rest, option.split("."))
    return {"verb": identity.get("verb"), "options": rest}


def _reason(status: Status) -> str:
    return {"to do": "starts", "partial": "resumes"}.get(status.state, f"runs again ({status.why})")
