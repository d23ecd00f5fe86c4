"""python -m tests.cpus [pytest arguments]: the suite eight times, as other CPUs would compute it.

No test may hang on the last bits of a float. ATEN_CPU_CAPABILITY chooses torch's own kernels;
matrix products do not heed it, so MKL and oneDNN are told apart from it. One line a run; exit
status 1 if any run failed, with the failures' names.
"""

import os
import subprocess
import sys
import time

KERNELS = ("default", "avx2", "avx512")  # each runs where the next one does
RUNS = [{"ATEN_CPU_CAPABILITY": kernels, "OMP_NUM_THREADS": threads}
        for kernels in KERNELS for threads in ("1", "2")]
RUNS += [{"MKL_CBWR": "COMPATIBLE"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}]
OURS = {name for run in RUNS for name in run}


def kernels_here() -> tuple[str, ...]:
    """Those that this CPU can run: torch takes the best, unless told otherwise."""
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    best = subprocess.run([sys.executable, "-c", ask], env=environment({}), check=True, text=True,
                          capture_output=True).stdout.strip().lower()
    return KERNELS[: KERNELS.index(best) + 1 if best in KERNELS else 1]


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with these settings and no other of their kind."""
    return {k: v for k, v in os.environ.items() if k not in OURS} | settings


def main(arguments: list[str]) -> int:
    here, status = kernels_here(), 0
    for settings in RUNS:
        label = " ".join(f"{k}={v}" for k, v in settings.items())
        if settings.get("ATEN_CPU_CAPABILITY", "default") not in here:
            print(f"{label}: left out, this CPU cannot run it", flush=True)
            continue
        start = time.time()
        found = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], text=True,
                               env=environment(settings), capture_output=True, check=False)
        lines = found.stdout.strip().splitlines() or found.stderr.strip().splitlines() or [""]
        print(f"{label}: {lines[-1]} ({time.time() - start:.0f} s)", flush=True)
        if found.returncode:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            print("\n".join(failed or [f"  exit status {found.returncode}"]), flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
