"""The wheel in an empty environment, outside of the project: it measures, and says what the study would need."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MEASURE = """
import torch
from torch import nn

import utilized_rank as ur

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
images = torch.randn(64, 3, 8, 8)
found = ur.measure(network, (images, network(images).argmax(1)), epsilon=5.0)
assert len(found.layers) == 2 and 0 < found.mlu <= 1
print(found)
ur.save(ur.compress(network, images, params=0.5), "small")
"""


def main(wheel: str) -> None:
    """Install the wheel alone, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", Path(wheel).absolute()], check=True)
        subprocess.run([python, "-c", MEASURE], cwd=folder, check=True)
        told = subprocess.run(
            [Path(folder, "bin", "utilized-rank"), "check"], capture_output=True, text=True, check=False
        )
        assert told.returncode == 1, told
        assert "is not installed: pip install 'utilized-rank[study]'" in told.stderr, told.stderr
        assert len(told.stderr.splitlines()) == 1, told.stderr
        print(told.stderr.strip())


if __name__ == "__main__":
    main(sys.argv[1])
