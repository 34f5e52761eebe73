"""Makes the table of docs/tpu.md: what each size takes on which TPU slice, without a TPU.

    python benchmarks/tpu_steps.py [--only 130m] [--json tpu_steps.json]

Every row is one `grug compile` of the starter, in a process of its own, one after another; a row
takes about a minute on 2 cores. Needs libtpu (`pip install "jax[tpu]"`).
"""

import json
import pathlib
import subprocess
import sys

import click

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"
ROWS = [  # size, topology, batch, further options
    ("130m", "v5e:2x2", 32, ""),
    ("130m", "v5p:2x2x1", 32, ""),
    ("130m", "v5p:2x2x1", 32, "--remat dots"),
    ("130m", "v5p:2x2x1", 32, "--remat none"),
    ("130m", "v6e:2x2", 32, ""),
    ("130m", "v6e:2x2", 32, "--remat dots"),
    ("130m", "v6e:2x2", 32, "--remat none"),
    ("130m", "tpu7x:2x2x1", 32, ""),
    ("130m", "v5e:4x4", 128, ""),
    ("300m", "v5e:4x4", 128, ""),
    ("300m", "v5p:2x2x1", 128, ""),
    ("300m", "v6e:2x2", 128, ""),
    ("520m", "v5e:4x4", 128, ""),
    ("520m", "v5p:2x2x1", 128, ""),
    ("520m", "v6e:4x4", 128, ""),
    ("520m", "v6e:4x4", 128, "--remat none"),
    ("1_2b", "v5p:2x2x1", 64, "--seq-len 4096"),
    ("1_2b", "v6e:4x4", 64, "--seq-len 4096"),
    ("1_2b", "v5e:4x4", 64, "--seq-len 4096"),
    ("1_2b", "v5p:2x2x4", 256, ""),
    ("1_2b", "v5p:4x4x4", 256, ""),
    ("1_2b", "v5p:4x4x4", 256, "--mesh data=32,model=2"),
    ("1_2b", "tpu7x:2x2x1", 16, "--seq-len 4096"),
]

TITLES = ["size, batch", "slice", "mesh", "GiB a device", "fits"]
TITLES += ["step", "tokens/s", "MFU", "sent", "compile"]


def measure(size, topology, batch, options):
    command = [sys.executable, "-m", "grug_keras", "compile", STARTER, "--json"]
    command += ["--size", size, "--topology", topology, "--batch", batch, *options.split()]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def as_row(report):
    def gib(name):
        return "-" if report[name] is None else f"{report[name] / 2**30:.1f}"

    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    cells = [
        f"{report['size']}, {report['batch_size']} x {report['seq_len']}",
        report["topology"] + ("" if report["remat"] == "full" else f", remat {report['remat']}"),
        mesh,
        f"{gib('arguments')} + {gib('temporaries')} of {gib('hbm')}",
        "yes" if report["fits"] else "no",
    ]
    if report["step_seconds"]:
        cells += [
            f"{1e3 * report['step_seconds']:.0f} ms",
            f"{report['tokens_per_second'] / 1e3:,.0f}k",
            f"{100 * report['mfu']:.0f}%",
            f"{sum(c['bytes'] for c in report['collectives'].values()) / 2**20:,.0f} MiB",
        ]
    else:
        cells += ["-"] * 4
    return "| " + " | ".join([*cells, f"{report['compile_seconds']:.0f} s"]) + " |"


@click.command()
@click.option("--only", default="", help="Rows of this size alone.")
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path), help="Write the reports here."
)
def main(only, path):
    reports = []
    print(f"| {' | '.join(TITLES)} |")
    print("|---" * len(TITLES) + "|")
    for size, topology, batch, options in ROWS:
        if size.startswith(only):
            reports.append(measure(size, topology, batch, options))
            print(as_row(reports[-1]), flush=True)
    if path:
        path.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
