"""Where the paths of a stage lie, on a laptop and in a Ray job; and the local head that takes jobs.

    python -m pipelines.lib.jobs head          # a Ray head on 127.0.0.1 for `ray job submit`, in the foreground

A job runs in an uploaded copy of the working directory, which Ray deletes when it needs the room. So a stage passes
each path of its config through `storage_path`, which puts relative ones under the folder that $NOVELLA_STORAGE names.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipelines.lib.config import InputError

STORAGE = "NOVELLA_STORAGE"
UPLOADED = "working_dir_files"  # the folder of Ray's session directory that holds uploaded working directories
HEAD_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # whoever may submit a job may run any command as this user
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux: 127.0.0.1 instead of the LAN address
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # `ray job stop` lets a training save; Ray's own 3 s are short
}


def storage_root() -> Path:
    """The folder under which relative paths lie: $NOVELLA_STORAGE, else the working directory.

    Raises InputError if $NOVELLA_STORAGE is no absolute path, or is needed (inside a job with an uploaded working
    directory) and not set.
    """
    text = os.environ.get(STORAGE)
    if text:
        root = Path(text).expanduser()
        if not root.is_absolute():
            raise InputError(f"{STORAGE}={text} is no absolute path; every process of a job must mean the same folder")
        return root
    if UPLOADED in Path.cwd().parts:
        raise InputError(
            f"{STORAGE} is not set in this Ray job, and its working directory is a copy that Ray deletes; start the "
            f"head with {STORAGE}=/a/shared/folder, or submit with "
            f'--runtime-env-json \'{{"env_vars": {{"{STORAGE}": "/a/shared/folder"}}}}\''
        )
    return Path.cwd()


def storage_path(text: str | os.PathLike[str]) -> Path:
    """A path of a config as an absolute path: `~` opened, relative ones under `storage_root()`.

    Raises InputError for a URL: stages read and write folders, local or shared.
    """
    text = os.fspath(text)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise InputError(f"{text} is a URL; give a local or shared folder (mount the bucket, for example)")
    path = Path(text).expanduser()
    return path if path.is_absolute() else Path(os.path.normpath(storage_root() / path))


def head(port: int, dashboard_port: int, more: Sequence[str] = ()) -> None:
    """Become a Ray head that listens on 127.0.0.1 only, asks for a token and runs jobs; never returns.

    Jobs inherit $NOVELLA_STORAGE, by default the folder in which the head was started.  more: further words for
    `ray start`.
    """
    for name, value in {**HEAD_ENVIRONMENT, STORAGE: str(Path.cwd())}.items():
        os.environ.setdefault(name, value)
    programs = Path(sys.executable).parent  # not resolved: the folder of the virtual environment
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"  # a job's `python` is this one, too
    ray = str(programs / "ray")
    make_token(ray)
    address = f"http://127.0.0.1:{dashboard_port}"
    print(
        f"A Ray head with its dashboard on {address} (end it with Ctrl-C); jobs write under {os.environ[STORAGE]}\n"
        "In another terminal:\n"
        f"    export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={address}\n"
        "    ray job submit --working-dir . -- python -m pipelines.train --help",
        flush=True,
    )
    where = ["--node-ip-address=127.0.0.1", f"--port={port}"]
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    os.execv(ray, [ray, "start", "--head", "--block", "--disable-usage-stats", *where, *dashboard, *more])


def make_token(ray: str) -> None:
    """Make ~/.ray/auth_token if no token is set or there: with RAY_AUTH_MODE=token, `ray start` wants one."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ["RAY_AUTH_MODE"] == "token" and not named and not (Path.home() / ".ray" / "auth_token").is_file():
        subprocess.run([ray, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)


class Parser(argparse.ArgumentParser):
    """Answers bad words as every command here does: in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help shows what there is\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m pipelines.lib.jobs", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("head", help="a Ray head on 127.0.0.1 that takes jobs, in the foreground")
    start.add_argument("--port", type=int, default=6379)
    start.add_argument("--dashboard-port", type=int, default=8265)
    words, more = parser.parse_known_args(argv)
    head(words.port, words.dashboard_port, more)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
