"""`import perex`, attaching, reading and scoring import no optional package.

Each check runs in a fresh interpreter, so that what other tests imported does not count. The last tests turn
the checker on code that does import one, to show that it would notice.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

OPTIONAL = (
    "accelerate",
    "datasets",
    "hypothesis",
    "lightning",
    "matplotlib",
    "mlxtend",
    "opacus",
    "pandas",
    "pyarrow",
    "pytorch_lightning",
    "ray",
    "scipy",
    "sklearn",
    "torchvision",
    "tqdm",
    "transformers",
)


def optional_packages_imported_by(code: str) -> set[str]:
    """Run `code` in a new interpreter and return those of OPTIONAL whose modules it brought in.

    `import torch` alone brings in some of them where they are installed (tqdm, for one). That is torch's
    doing: they are forgotten before `code` runs, and count only if it asks for them again.
    """
    program = "\n".join(
        (
            "import sys",
            "import torch",
            f"optional = {set(OPTIONAL)}",
            "found = lambda: {name for name in sys.modules if name.partition('.')[0] in optional}",
            "for name in found(): del sys.modules[name]",
            textwrap.dedent(code),
            "print('IMPORTED', *{name.partition('.')[0] for name in found()})",
        )
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


SETUP = """
import perex
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
loss_fn = torch.nn.CrossEntropyLoss()
"""

USES = {
    "attach and read": SETUP
    + """
with perex.attach(model) as px:
    loss_fn(model(x), y).backward()
    assert px.norms().shape == (5,)
    px.norms(by="module"), px.norms(by="parameter"), str(px.report())
""",
    "score quietly": SETUP
    + """
scores = perex.score(model, (x, y), loss_fn, progress=False)
assert len(scores) == 5
scores.top(2), repr(scores)
""",
}


@pytest.mark.parametrize("use", USES)
def test_no_optional_package_is_imported(use: str) -> None:
    assert optional_packages_imported_by(USES[use]) == set()


def test_the_checker_notices_imports_of_packages_and_submodules_anywhere() -> None:
    for package in ("tqdm", "pyarrow", "matplotlib"):
        pytest.importorskip(package)
    code = """
    import tqdm, perex
    def draw():
        from matplotlib.figure import Figure
        import pyarrow.parquet as parquet
    draw()
    """
    assert optional_packages_imported_by(code) >= {"tqdm", "pyarrow", "matplotlib"}


def test_the_checker_does_not_swallow_an_error() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        optional_packages_imported_by("1 / 0")
