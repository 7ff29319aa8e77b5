"""The registry as the stages and the command line use it.

ROOT/registry.json
ROOT/checkpoints/<id>/{manifest.json, model/}                  immutable
ROOT/versions/<stage>/<name>/<number>.json                     which checkpoint claimed which version number
ROOT/aliases/<stage>/<name>/<alias>/<number>.json              the highest number is where the alias points
ROOT/evaluations/<id>/<number>.json                            results, oldest first
ROOT/trash/<id>/ ROOT/trash/records/<id>/<number>.json         what gc moved away, and when
ROOT/resume/checkpoints/<id>/ ROOT/resume/trash/               resumable state of the run that made a checkpoint
ROOT/leases/<id>/<lease id>.json                               which running jobs use a checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from configs.errors import UserError
from stages.registry import aliases, claims, index, leases, ledger, trash
from stages.registry.best import pick
from stages.registry.commit import commit
from stages.registry.contract import check_finite, check_stage
from stages.registry.integrity import Problem, check, read_checkpoint
from stages.registry.layout import open_root
from stages.registry.lineage import LineageNode, ancestors, trace
from stages.registry.manifest import Checkpoint, Parent
from stages.registry.names import (
    FORMS,
    Reference,
    check_name,
    did_you_mean,
    is_id,
    new_id,
    now,
    parse,
)
from stages.registry.provenance import provenance
from stages.registry.sealing import plain
from stages.registry.sharing import find_in
from stages.registry.storage import check_room, durable_mkdir, storage_error

_LOOKS = 3  # at a checkpoint that seems damaged
# Registry has a method called `list`, which hides the type inside the class
Problems = list[Problem]
Names = list[str]
Records = list[dict[str, Any]]


class Registry:
    """Checkpoints of all stages under one folder. Any number of processes may use it at once, on any file system."""

    def __init__(self, root: Path | str, create: bool = True) -> None:
        """Open a registry; start one when the folder is new or empty and `create`. Raises UserError otherwise."""
        self.root = Path(root).expanduser().absolute()
        open_root(self.root, create)

    # ---- publishing

    def publish(
        self,
        stage: str,
        name: str,
        write: Callable[[Path], None],
        *,
        parents: Sequence[Parent] = (),
        info: Mapping[str, Any] | None = None,
        need_bytes: int = 0,
        check_weights: bool = True,
    ) -> Checkpoint:
        """Publish what `write(model_dir)` writes, whole or not at all; to be called on one rank.

        info: what the stage records (config, data, tokenizer, metrics, seed, stage_info), JSON. need_bytes: expected
        size; at least the size of the name's newest version is assumed. check_weights: refuse NaN and infinities in
        *.safetensors. Raises UserError (names, full disk, permission, links or pickles among the files, weights).
        """
        family = f"{check_name(stage, 'stage')}/{check_name(name, 'name')}"
        record = {"info": plain(dict(info or {}), "info"), "parents": [parent.to_json() for parent in parents]}
        newest = self._newest(stage, name)
        self._make("checkpoints", family)
        check_room(self.root, max(need_bytes, newest.size if newest else 0))
        checkpoint_id = new_id()
        floor = newest.version if newest else 0  # the claims count by themselves; this is for a registry that lost them

        def manifest(files: dict[str, Any]) -> dict[str, Any]:
            facts = {"id": checkpoint_id, "stage": stage, "name": name, "created": now()}
            version = ledger.append(self.root / "versions" / stage / name, lambda n: {**facts, "version": n}, floor)
            return {**facts, "format": 1, "version": version, "files": files, **record, **provenance()}

        path = commit(
            self.root / "checkpoints",
            checkpoint_id,
            family,
            write,
            check_finite if check_weights else _accept,
            manifest,
            find_in(self._relatives(stage, name, parents), lambda: index.holders(self.root)),
        )
        published = read_checkpoint(path)
        assert isinstance(published, Checkpoint), published
        for parent in parents:  # gc, which moves first and looks for children then, may not have seen this one
            if parent.id is not None:
                self._recall(parent.id, f"{published.ref} was made from it")
        return published

    def _relatives(self, stage: str, name: str, parents: Sequence[Parent]) -> Sequence[Checkpoint]:
        """Where files that a new checkpoint holds too are looked for first: its parents, then the newest versions of its name."""
        near = [*(parent.id for parent in parents if parent.id), *(claims.newest(self.root, stage, name, 3) or [])]
        return [item for item in map(self._load, near) if isinstance(item, Checkpoint)]

    def check_publishable(self, family: str) -> None:
        """Find out before hours of training that stage/name could not be published. Raises UserError."""
        folder = self._make("checkpoints", family)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder} may not be written, so {family} could not be published: check its owner, or choose another registry folder")
        check_room(self.root, 0)

    def _make(self, folder: str, doing: str) -> Path:
        try:
            durable_mkdir(self.root / folder)
        except OSError as error:
            if told := storage_error(error, f"publishing {doing}"):
                raise told from error
            raise
        return self.root / folder

    # ---- finding

    def resolve(self, ref: str, stage: str | tuple[str, ...] | None = None, *, deep: bool = False) -> Checkpoint:
        """The checkpoint a reference means, quickly verified, or deeply. `stage`: the stage or stages it must come from.

        Raises UserError when there is none (saying what there is), when it is damaged, when the stage is another. A
        damaged newest version is an error, never a reason to take an older one.
        """
        path, problems, checkpoint = self._look(ref, deep)
        if not isinstance(checkpoint, Checkpoint):
            shown = "".join(f"\n  {problem}" for problem in problems[:5])
            more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(
                f"{ref} ({path}) is damaged:{shown}{more}\nSee all of it: align registry verify {_quoted(ref)} --deep "
                f"--registry {self.root}. Train it again (in a chain: align run CHAIN.yaml --from "
                f"{ref.partition('/')[0]}), or name a sound version."
            )
        if stage is not None:
            check_stage(checkpoint, stage)
        return checkpoint

    def _look(self, ref: str, deep: bool) -> tuple[Path, Problems, Checkpoint | None]:
        """Folder, problems and, where there are none, the checkpoint. What is not whole is looked for anew: gc may be moving it, or back."""
        for _ in range(_LOOKS):
            path = self.root / "checkpoints" / self._locate(ref)
            if problems := check(path, deep):
                if deep and not check(path, False):  # in its place with all files: contents have changed, no move
                    break
                continue
            checkpoint = read_checkpoint(path)
            if isinstance(checkpoint, Checkpoint):
                return path, [], checkpoint
            problems = [checkpoint]
        return path, problems, None

    def list(self, stage: str | None = None, name: str | None = None) -> list[Checkpoint]:
        """All checkpoints with a sound manifest, by stage, name, version. See `damaged` for the others."""
        found = index.scan(self.root).values()
        return [item for item in found if isinstance(item, Checkpoint) and stage in (None, item.stage) and name in (None, item.name)]

    def families(self) -> Names:
        """Every stage/name that was ever published, sorted, from names of folders alone: `list` knows which still hold something."""
        return claims.families(self.root) or self._families()

    def damaged(self) -> dict[str, Problem]:
        """Checkpoint id -> what is wrong with its manifest, for those that `list` cannot show."""
        return {key: item for key, item in index.scan(self.root, strict=True).items() if isinstance(item, Problem)}

    def verify(self, ref: str, deep: bool = False) -> Problems:
        """All problems of a checkpoint ([] is good): manifest, set of files, sizes; with `deep` contents. UserError
        when the reference means nothing."""
        return check(self.root / "checkpoints" / self._locate(ref), deep)

    def lineage(self, ref: str) -> LineageNode:
        """What a checkpoint was made from, back to the models from outside. Raises UserError like `resolve`."""
        return trace(self.resolve(ref), self._load)

    def ancestors(self, checkpoint: Checkpoint) -> Sequence[Checkpoint]:
        """The checkpoint and every one of this registry that it was made from."""
        return ancestors(checkpoint, self._load)

    def _load(self, checkpoint_id: str) -> Checkpoint | Problem | None:
        path = self.root / "checkpoints" / checkpoint_id
        return read_checkpoint(path) if is_id(checkpoint_id) and path.is_dir() else None

    def _versions(self, stage: str, name: str) -> dict[int, str]:
        """Version -> id of all published checkpoints of a name, damaged ones too (their claims still name them)."""
        versions = {item.version: item.id for item in self.list(stage, name)}
        folder = self.root / "versions" / stage / name
        for number in ledger.numbers(folder):
            if (
                number not in versions
                and (self.root / "checkpoints" / (claimed := self._claim(folder, number))).is_dir()
            ):
                versions[number] = claimed
        return versions

    @staticmethod
    def _claim(claims: Path, number: int) -> str:
        claimed = ledger.read(claims, number).get("id")
        if not is_id(str(claimed)):
            raise UserError(
                f"{ledger.entry_path(claims, number)}: names no checkpoint. Restore this file from a backup"
            )
        return str(claimed)

    def _newest(self, stage: str, name: str) -> Checkpoint | None:
        claimed = claims.newest(self.root, stage, name, 3)
        found = self.list(stage, name) if claimed is None else [item for item in map(self._load, claimed) if isinstance(item, Checkpoint)]
        return max(found, key=lambda item: item.version, default=None)

    def _locate(self, ref: str) -> str:
        """The id a reference means; the checkpoint's folder exists. Raises UserError."""
        if is_id(ref):
            if not (self.root / "checkpoints" / ref).is_dir():
                raise UserError(
                    f"no checkpoint {ref} in {self.root}. See what there is: align registry list --registry {self.root}"
                )
            return ref
        if isinstance(ref, str) and "/" not in ref.partition("@")[0]:
            close = did_you_mean(ref.partition("@")[0], [item.name for item in self.list()])
            families = [item for item in self._families() if item.endswith(f"/{ref.partition('@')[0]}")]
            hint = f" Did you mean {families[0]}?" if families else close
            raise UserError(f"{ref!r} is not a reference to a checkpoint; write one of: {FORMS}.{hint}")
        asked = parse(ref)
        if asked.kind == "latest" and (newest := claims.newest(self.root, asked.stage, asked.name)):
            return newest[0]
        if asked.kind == "version" and (claimed := claims.version(self.root, asked.stage, asked.name, int(asked.value))):
            return claimed
        versions = self._versions(asked.stage, asked.name)
        if not versions:
            self._unknown_family(asked)
        if asked.kind == "latest":
            return versions[max(versions)]
        if asked.kind == "best":
            results = {version: self._results(versions[version]) for version in sorted(versions)}
            return versions[pick(asked.family, asked.value, results)]
        if asked.kind == "alias":
            return self._alias_target(asked, versions)
        if int(asked.value) not in versions:
            waits = trash.find(self.root, f"{asked.family}@{asked.value}")
            hint = f"; it lies in the trash: align registry restore {asked.family}@{asked.value} --registry {self.root}" if waits else ""
            raise UserError(f"{asked.family} has no version {asked.value} in {self.root}{hint}; it has {_some(versions)}")
        return versions[int(asked.value)]

    def _families(self) -> Names:
        return sorted({f"{item.stage}/{item.name}" for item in self.list()})

    def _unknown_family(self, asked: Reference) -> NoReturn:
        known = self._families()
        there = f"It holds {', '.join(known[:8])}{' …' if len(known) > 8 else ''}." if known else "It is empty."
        raise UserError(
            f"no checkpoint {asked.family} in {self.root}. {there}{did_you_mean(asked.family, known)} "
            f"Train it first, or name another registry."
        )

    # ---- aliases

    def set_alias(self, family: str, alias: str, ref: str, expect: str | None = None) -> Checkpoint:
        """Point stage/name@alias at a checkpoint of that name, after a deep verification; the history is kept.

        expect: move it only from there: the reference it must point at now, or "" when it must not exist yet.
        Raises UserError, also when another process moved it meanwhile.
        """
        return aliases.move(self, family, alias, ref, expect)

    def rollback_alias(self, family: str, alias: str) -> Checkpoint:
        """Point an alias at where it pointed before its newest move that was not rolled back; the rollback is kept in the history too.

        Raises UserError: there is nothing before, it is damaged or gone, another process moved the alias meanwhile.
        """
        return aliases.rollback(self, family, alias)

    def id_of(self, ref: str) -> str:
        """The id a reference means; unlike `resolve` this checks nothing. Raises UserError."""
        return self._locate(ref)

    def ref_of(self, checkpoint_id: str) -> str:
        """sft/demo@3 for an id; the id where it is not there; "nothing" for ""."""
        item = self._load(checkpoint_id) if checkpoint_id else None
        return item.ref if isinstance(item, Checkpoint) else checkpoint_id or "nothing"

    def rollback_target(self, family: str, alias: str) -> str | None:
        """The id that a rollback would point at; None when there is none."""
        return aliases.rollback_target(self, family, alias)

    def alias_history(self, family: str, alias: str) -> Records:
        """Where an alias pointed, oldest first: {"number", "id", "ref", "created", "previous", …}; "undoes" in a rollback."""
        return aliases.history(self, family, alias)

    def aliases(self, family: str) -> dict[str, str]:
        """Alias -> id of the checkpoint it points at."""
        return aliases.targets(self, family)

    def _alias_target(self, asked: Reference, versions: Mapping[int, str]) -> str:
        found = self.aliases(asked.family)
        if asked.value not in found:
            known = sorted(found)
            there = f"aliases {', '.join(known)}; " if known else "no alias; "
            to_set = f" To set it: align registry alias {asked.family} {asked.value} REF"
            raise UserError(
                f"{asked.family} has no alias {asked.value!r} in {self.root}; it has {there}{_some(versions)}."
                f"{did_you_mean(asked.value, [*known, 'latest', 'best']) or to_set}"
            )
        if found[asked.value] not in versions.values() and not self._recall(found[asked.value], f"{asked.family}@{asked.value} points at it"):
            raise UserError(
                f"{asked.family}@{asked.value} points at {found[asked.value]}, which is not in {self.root} any more. "
                f"Move it: align registry alias {asked.family} {asked.value} REF; it has {_some(versions)}"
            )
        return found[asked.value]

    # ---- what gc moves, and what keeps it from moving

    def lease(self, checkpoint: Checkpoint, purpose: str, *, renewed: bool = True) -> leases.Held | None:
        """Hold a checkpoint until the lease is given back or this process ends; None, and a warning, in a registry that can't be written.

        renewed: see `leases.take`. Raises UserError when the checkpoint was purged meanwhile.
        """
        held = leases.take_if_possible(self.root, [checkpoint.id], purpose, renewed=renewed)
        if not self._recall(checkpoint.id, f"in use: {purpose}"):
            raise UserError(f"{checkpoint.ref} ({checkpoint.id}) was removed from {self.root} meanwhile; name another version")
        return held

    def restore(self, ref: str) -> Checkpoint:
        """Bring a checkpoint back from the trash, named by its id or as stage/name@version. Raises UserError."""
        checkpoint_id = trash.find(self.root, ref) or ref
        if not (is_id(checkpoint_id) and self._recall(checkpoint_id, "restored")):
            there = ", ".join(item.ref for item in trash.trashed(self.root))
            raise UserError(f"{ref} is not in the trash of {self.root}; {f'it holds {there}' if there else 'it is empty'}")
        return self.resolve(checkpoint_id)

    def _recall(self, checkpoint_id: str, why: str) -> bool:
        """Bring a checkpoint back if gc has moved it, and what it was made from; whether it is in its place."""
        try:
            return trash.bring_back(self.root, checkpoint_id, why)
        except OSError as error:
            if told := storage_error(error, f"bringing {checkpoint_id} back from the trash", "It is in its place or still in the trash, whole; try again."):
                raise told from error
            raise

    # ---- evaluations

    def add_evaluation(self, checkpoint: Checkpoint, result: Mapping[str, Any]) -> None:
        """Keep a result beside a checkpoint. It must carry "eval_set", the fingerprint of what it was measured on; the
        metrics lie under "metrics" or at the top. Raises UserError."""
        if not isinstance(result.get("eval_set"), str) or not result["eval_set"]:
            raise UserError(
                f"a result for {checkpoint.ref} carries no eval_set (the fingerprint of the evaluation set)"
            )
        if self._load(checkpoint.id) is None:
            raise UserError(f"{checkpoint.ref} ({checkpoint.id}) is not in {self.root}; the result was not kept")
        body = {"id": checkpoint.id, "ref": checkpoint.ref, "created": now(), "result": plain(dict(result), "result")}
        try:
            ledger.append(self.root / "evaluations" / checkpoint.id, lambda number: body)
        except OSError as error:
            if told := storage_error(error, f"keeping a result of {checkpoint.ref}"):
                raise told from error
            raise

    def evaluations(self, checkpoint: Checkpoint) -> Records:
        """The results kept for a checkpoint, oldest first, as they were given. Raises UserError for a damaged file."""
        return self._results(checkpoint.id)

    def _results(self, checkpoint_id: str) -> Records:
        folder = self.root / "evaluations" / checkpoint_id
        return [ledger.read(folder, number)["result"] for number in ledger.numbers(folder)]


def _accept(model_dir: Path) -> None:
    """No check of the weights."""


def _some(versions: Mapping[int, str]) -> str:
    newest = sorted(versions)[-12:]
    return (
        f"version{'s' if len(versions) > 1 else ''} {'… ' if len(versions) > 12 else ''}{', '.join(map(str, newest))}"
    )


def _quoted(ref: str) -> str:
    return f"'{ref}'" if " " in ref else ref
