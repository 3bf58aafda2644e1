"""What a CUDA machine does with this program, in as many minutes as there are; results are written stage by stage.

    python benchmarks/gpu/campaign.py --minutes 12 --source SMOLLM2 --data DIR --out OUT
    python benchmarks/gpu/campaign.py --minutes 12 --device cpu --tiny --out OUT      # to try it
    python benchmarks/gpu/campaign.py plan                                            # stages and estimates
    python benchmarks/gpu/campaign.py report OUT/results.json                         # tables, as Markdown

Every stage is a process of its own, which is ended at its limit: what it has found so far is kept. A stage that is done
in OUT is not run again, so the same command goes on where time or files were short. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (str(HERE), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from plan import BY_NAME, STAGES, Stage, allowed, refusal  # noqa: E402

FORMAT = 1
# characters that are kept of what a failed stage printed
TAIL = 3000


def record_path(out: Path, name: str) -> Path:
    return out / "stages" / f"{name}.json"


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(record_path(out, name).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


def write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def collect(out: Path, tiny: bool, device: str) -> dict[str, Any]:
    """All records in one file, results.json."""
    records = {stage.name: record for stage in STAGES if (record := read_record(out, stage.name)) is not None}
    content = {"format": FORMAT, "tiny": tiny, "device": device, "stages": records}
    write(out / "results.json", content)
    return content


def run_stage(stage: Stage, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The record of one stage that was run in a process of its own."""
    found, log = args.out / "stages" / f"{stage.name}.found.json", args.out / "stages" / f"{stage.name}.log"
    found.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "campaign.py"), "stage", "--only", stage.name, "--out", str(args.out)]
    command += ["--device", args.device, "--seconds", str(seconds), *(["--tiny"] if args.tiny else [])]
    command += ["--refine", args.refine]
    for option in ("source", "data"):
        if getattr(args, option) is not None:
            command += [f"--{option}", str(getattr(args, option))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(":")}
    environment |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else "failed"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            status = "out of time" if isinstance(error, subprocess.TimeoutExpired) else "interrupted"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    record |= {"estimate": stage.estimate, "allowed": round(seconds, 1)}
    if found.is_file():
        record |= json.loads(found.read_text("utf-8"))
    if status != "done":
        record["why"] = log.read_text("utf-8", errors="replace")[-TAIL:].replace(str(ROOT), ".")
    return record


def run(args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    names = args.only.split(",") if args.only else list(BY_NAME)
    done = {name for name in BY_NAME if (read_record(args.out, name) or {}).get("status") == "done"}
    for stage in STAGES:
        if stage.name not in names or (stage.name in done and not args.again):
            continue
        left = end - time.monotonic()
        why = refusal(stage, left, args.source is not None or args.tiny, done)
        if why is not None:
            record: dict[str, Any] = {"status": "skipped", "seconds": 0.0, "estimate": stage.estimate, "why": why}
            # what an earlier call has found is worth more
            if (read_record(args.out, stage.name) or {}).get("status", "skipped") == "skipped":
                write(record_path(args.out, stage.name), record)
        else:
            record = run_stage(stage, args, allowed(stage, left))
            write(record_path(args.out, stage.name), record)
            if record["status"] == "done":
                done.add(stage.name)
        collect(args.out, args.tiny, args.device)
        told = record.get("why", "").strip().splitlines()[-1:]
        print(f"{stage.name:16}{record['status']:12}{record['seconds']:7.1f} s", *told, flush=True)
        if record["status"] == "interrupted":
            return 130
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="run", choices=("run", "plan", "report", "stage"))
    parser.add_argument("results", nargs="?", type=Path, help="for report: results.json")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--source", help="SmolLM2-135M-Instruct: folder or GGUF; without it what needs it is skipped")
    parser.add_argument("--data", type=Path, help="folder of texts that text.py or prepare.sh has written")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the model that ships, and a little of everything")
    parser.add_argument("--refine", choices=("off", "fast", "full"), default="fast", help="of SmolLM2's conversions")
    parser.add_argument("--only", help="stages, A,B")
    parser.add_argument("--again", action="store_true", help="run stages again that are done")
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "plan":
        for stage in STAGES:
            print(f"{stage.name:16}{stage.estimate:5.0f} s, at most {stage.limit:4.0f} s  {stage.title}")
        print(f"{'':16}{sum(stage.estimate for stage in STAGES):5.0f} s")
    elif args.command == "report":
        from report import markdown

        print(markdown(json.loads((args.results or args.out / "results.json").read_text("utf-8"))))
    elif args.command == "stage":
        from stages import run_one

        run_one(args.only, args)
    else:
        return run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
