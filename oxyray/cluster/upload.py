"""What a job takes along to a Ray cluster, and whether the cluster will have it, found out before anything is sent.

`ray job submit` zips the checkout and uploads it. What .gitignore, .rayignore or the excludes match stays behind without a word, and every
relative path means the copy on the cluster, which Ray deletes some time after the job. So the run folder must be on a disk that the cluster
shares, and a path in the overrides must either be uploaded or be such a disk's. `launch/ray_job.sh` asks here first:

    python -m oxyray.cluster.upload check ADDRESS STAGE [overrides]   the way the head wants to be spoken to, and the runtime environment
    python -m oxyray.cluster.upload end ADDRESS JOB                   ends with the job's own exit status

The listing walks the checkout with Ray's own functions, which are private: a test holds it to the package that Ray writes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oxyray.errors import ClusterError, ConfigError, OxyrayError

# Beside what .gitignore and .rayignore say and what Ray leaves out anyway (.git, .venv, venv, __pycache__). Data belong on a shared disk.
EXCLUDES = (
    *("/runs", "/multirun", "/outputs", "/wandb", "/data", ".env", ".*_cache", ".hypothesis"),
    *("*.parquet", "*.arrow", "*.safetensors", "*.pt", "*.ckpt", "*.npy", "*.csv.gz", "*.json.gz", "*.zip", "*.tar.gz"),
)
MOST = 512 * 2**20  # what Ray keeps of one package
MOST_BY_HTTP = 100 * 2**20  # what the head's dashboard takes in one request, and a job comes by a request
_PATIENCE_S = 20.0
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Upload:
    """`files`: path below `root` to size; empty folders count as files of size 0 and end in a slash. `left_out`: the uppermost paths that
    stay behind."""

    root: Path
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the zip file. Ray does not compress, so they follow from the sizes and the names."""
        return 22 + sum(76 + 2 * len(name.encode()) + size for name, size in self.files.items())

    def text(self) -> str:
        largest = sorted(self.files.items(), key=lambda file: -file[1])[:5]
        return (
            f"upload: {len(self.files)} files, {_mib(self.size)} zipped (at most {_mib(MOST_BY_HTTP)} by HTTP, {_mib(MOST)} in Ray)\n"
            f"  largest: {', '.join(f'{name} {_mib(size)}' for name, size in largest) or 'none'}\n"
            f"  left out: {_names(self.left_out)}"
        )


def look(root: Path) -> Upload:
    """What `ray job submit` would upload of `root`."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    root = root.absolute()
    matches = _get_excludes(root, [*get_runtime_env_default_excludes(), *EXCLUDES])
    met: list[Path] = []
    kept: list[Path] = []

    def excluded(path: Path) -> bool:  # stands first among the excludes, so it is asked about every path that the walk comes to
        met.append(path)
        return bool(matches(path))

    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [excluded], kept.append, include_gitignore=gitignore, logger=logging.getLogger(__name__))
    files: dict[str, int] = {}
    for path in kept:
        name = path.relative_to(root).as_posix()
        if path.is_file():
            files[name] = path.stat().st_size
        elif path.is_dir() and next(path.iterdir(), None) is None:
            files[f"{name}/"] = 0
    gone = set(met) - set(kept)
    return Upload(root, files, tuple(sorted(path.relative_to(root).as_posix() for path in gone)))


def check_size(upload: Upload) -> None:
    """ClusterError when the cluster would refuse the upload for its size."""
    if upload.size > MOST_BY_HTTP:
        raise ClusterError(
            f"the upload has {_mib(upload.size)}, and a cluster takes {_mib(MOST_BY_HTTP)}: name the largest files above in .rayignore, "
            "or put them on a disk that the cluster shares"
        )


def check_words(stage: str, words: Sequence[str], upload: Upload) -> list[str]:
    """ConfigError when the words of a command name a path that the job would not find, or would lose. Gives what is worth a note."""
    if stage == "doctor" or "--help" in words or "-h" in words:
        return []
    joined = " ".join(words).replace("--config-dir ", "--config-dir=").split(" ")
    said = {key.lstrip("+"): value.strip("'\"") for key, mark, value in (word.partition("=") for word in joined) if mark}
    kept = ["run_dir", *(["hydra.sweep.dir"] if "-m" in words or "--multirun" in words else [])]
    for key in kept:
        if not said.get(key, "").startswith(("/", "~")):
            raise ConfigError(
                f"{key}: must be a full path that the whole cluster shares ({key}=/shared/...): a job works in a copy of the checkout "
                "that Ray deletes later"
            )
    notes = [_check_path(key, value, upload) for key, value in said.items() if key not in kept and (key == "data.path" or "/" in value)]
    return [note for note in notes if note]


def _check_path(key: str, value: str, upload: Upload) -> str:
    mend = f"put it on a disk that the whole cluster shares and give its full path there: {key}=/shared/..."
    full = Path(value).expanduser()
    place = Path(os.path.normpath(upload.root / full))
    here = place.is_relative_to(upload.root)
    if full.is_absolute():
        return f"{key}={value} lies in the checkout, but a full path is not uploaded: the cluster must see it there" if here else ""
    if not place.exists():
        if key == "data.path":
            raise ConfigError(f"{key}={value}: no such file or folder in the checkout, from where it would be uploaded: {mend}")
        return ""  # a word with a slash that is no path
    if not here:
        raise ConfigError(f"{key}={value}: not uploaded, as it lies outside of the checkout: {mend}")
    behind = [name for name in upload.left_out if _related(upload.root / name, place)]
    if behind:
        raise ConfigError(f"{key}={value}: not uploaded, as .gitignore, .rayignore or the excludes match {_names(behind)}: {mend}")
    return ""


def _related(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def token() -> str | None:
    """The token, from where Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    said = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if said:
        return said
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named}: cannot be read ({error.strerror}): name the file with the token") from None
        return None


def knock(address: str) -> str:
    """How the head wants to be spoken to: `token` or `disabled`. ClusterError when it does not answer or refuses the token."""
    mode = str(_ask(address, "/api/authentication_mode").get("authentication_mode", "disabled"))
    if mode == "token" and token() is None:
        raise ClusterError(
            f"{address} asks for a token and none is here: set RAY_AUTH_TOKEN, or copy ~/.ray/auth_token of the head to the same place"
        )
    theirs, ours = _ask(address, "/api/version").get("ray_version"), version("ray")
    if theirs != ours:
        print(f"note: the cluster runs Ray {theirs}, this checkout is made for {ours}", file=sys.stderr)
    return mode


def outcome(address: str, job: str) -> int:
    """The exit status of a job that is over: its command's own, 1 where there is none. ClusterError when it is not over or not known."""
    ends = time.monotonic() + _PATIENCE_S
    found = _ask(address, f"/api/jobs/{job}")
    while found.get("status") not in _OVER and time.monotonic() < ends:
        time.sleep(0.5)
        found = _ask(address, f"/api/jobs/{job}")
    status, code = found.get("status"), found.get("driver_exit_code")
    if status not in _OVER:
        raise ClusterError(f"job {job} is {status}, but its log ended here: follow it again")
    if status == "SUCCEEDED":
        return 0
    why = "was stopped" if status == "STOPPED" else f"failed with exit status {code}" if code else f"failed: {found.get('message')}"
    hint = "; `python` must be the cluster's .venv: start Ray with launch/cluster/start.sh, or from a shell with it" if code == 127 else ""
    print(f"error: job {job} {why}{hint}", file=sys.stderr)
    return 1 if not code else code if code > 0 else 128 - code


def _ask(address: str, path: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{address.rstrip('/')}{path}")
    said = token()
    if said is not None:
        request.add_header("Authorization", f"Bearer {said}")
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ClusterError(f"{address} refuses the token: bring the head's own (its ~/.ray/auth_token or RAY_AUTH_TOKEN)") from None
        if error.code == 404 and path.startswith("/api/jobs/"):
            raise ClusterError(f"{address} knows no job {path.rpartition('/')[2]}: it was not submitted, see above") from None
        raise ClusterError(f"{address}{path}: HTTP status {error.code}: is it the dashboard of a Ray head?") from None
    except (OSError, ValueError) as error:  # no connection, a limit passed, or an answer that is not JSON
        raise ClusterError(
            f"{address}: no answer from a Ray head ({getattr(error, 'reason', error)}): it listens to its own machine only, unless told "
            "otherwise: work there, or run `ssh -N -L 8265:127.0.0.1:8265 HEAD` beside this"
        ) from None


def _names(paths: Sequence[str]) -> str:
    """Paths in a few words: those of one name are counted."""
    count = Counter(path.rpartition("/")[2] for path in paths)
    said = [f"{last} ({number} times)" for last, number in count.items() if number > 1]
    said += [path for path in paths if count[path.rpartition("/")[2]] == 1]
    return ", ".join(said[:12]) + (f" and {len(said) - 12} more" if len(said) > 12 else "") or "nothing"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def main(argv: Sequence[str]) -> int:
    try:
        what, address, *rest = argv
        if what == "end":
            return outcome(address, rest[0])
        upload = look(Path.cwd())
        print(upload.text(), file=sys.stderr)
        check_size(upload)
        for note in check_words(rest[0], rest[1:], upload):
            print(f"note: {note}", file=sys.stderr)
        print(knock(address) if address else "none")
        print(json.dumps({"working_dir": str(upload.root), "excludes": EXCLUDES}))
        return 0
    except OxyrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
