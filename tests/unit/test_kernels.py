"""What importing bitsandbytes must not cost."""

import sys

from tests.support.processes import run

IMPORT = """
import sys, torch
compile = torch.compile
import qdora.nf4
assert torch.compile is compile
print(*(name for name in ("torch._inductor.compile_fx", "torch._dynamo") if name in sys.modules))
"""


def test_quantisation_is_there_without_a_compiler() -> None:
    done = run([sys.executable, "-c", IMPORT], cold=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    compiles = "import sys, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    done = run([sys.executable, "-c", compiles], cold=True)
    assert done.stdout.strip() == "True", "bitsandbytes no longer compiles at import: qdora/kernels.py can go"
