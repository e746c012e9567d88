"""Choosing, forcing and explaining backends; what happens when one is missing."""

import pytest
import torch
from processes import python

import pyfused
from pyfused import _binary, dispatch

ARGS = (torch.zeros(2), 3)


@pytest.fixture
def table(monkeypatch):
    """An op "probe" with a reference and a cpu kernel that takes even numbers only."""
    entries = {
        "reference": dispatch.Kernel(lambda x, n: "reference"),
        "cpu": dispatch.Kernel(lambda x, n: "cpu", lambda x, n: f"n must be even, not {n}" if n % 2 else None),
    }
    monkeypatch.setitem(dispatch.TABLE, "probe", entries)
    monkeypatch.delitem(dispatch.UNAVAILABLE, "cpu", raising=False)
    monkeypatch.setattr(dispatch, "_forced", None)


def test_the_first_backend_that_does_not_object_runs(table):
    assert dispatch.pick("probe", (torch.zeros(2), 2))(None, 2) == "cpu"
    assert dispatch.pick("probe", (torch.zeros(2), 3))(None, 3) == "reference"


def test_forcing_a_backend_that_cannot_raises_its_reason(table):
    with pyfused.use_backend("cpu"), pytest.raises(RuntimeError, match=r"backend 'cpu'.*n must be even, not 3"):
        dispatch.pick("probe", ARGS)


def test_forcing_the_reference_and_nesting(table):
    even = (torch.zeros(2), 2)
    with pyfused.use_backend("reference"):
        assert dispatch.pick("probe", even)(*even) == "reference"
        with pyfused.use_backend(None):
            assert dispatch.pick("probe", even)(*even) == "cpu"
        assert dispatch.pick("probe", even)(*even) == "reference"
    assert dispatch.pick("probe", even)(*even) == "cpu"


def test_forcing_is_undone_by_an_exception(table):
    with pytest.raises(KeyError), pyfused.use_backend("reference"):
        raise KeyError
    assert dispatch._forced is None


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"'tpu'.*reference, cpu, cuda, triton"), pyfused.use_backend("tpu"):
        pass


def test_explain_names_choice_and_reasons(table):
    answer = pyfused.explain("probe", *ARGS)
    assert answer["cpu"] == "n must be even, not 3"
    assert answer["reference"] == "chosen"
    assert set(answer) == set(dispatch.BACKENDS)


def test_a_backend_without_a_kernel_says_so(table, monkeypatch):
    monkeypatch.delitem(dispatch.UNAVAILABLE, "cuda", raising=False)
    assert "no kernel for probe" in pyfused.explain("probe", *ARGS)["cuda"]


def test_a_device_that_a_backend_does_not_serve(table):
    meta = (torch.zeros(2, device="meta"), 2)
    assert "device 'meta'" in pyfused.explain("probe", *meta)["cpu"]
    assert dispatch.pick("probe", meta)(*meta) == "reference"


WITHOUT_C = "import sys; sys.modules['pyfused._C'] = None; import pyfused, torch; "


def test_without_the_compiled_module_everything_still_works():
    run = python(
        WITHOUT_C + "ids = torch.tensor([0, 1]);"
        "print(pyfused.functional.embedding_dot(ids, ids, torch.ones(2, 3), torch.ones(2, 3)).tolist());"
        "print(pyfused.available_backends()['cpu'])"
    )
    assert run.returncode == 0, run.stderr
    assert "[3.0, 3.0]" in run.stdout
    assert "pyfused._C could not be imported" in run.stdout


def test_without_the_compiled_module_forcing_cpu_says_why():
    run = python(
        WITHOUT_C + "ids = torch.tensor([0]);"
        "pyfused.functional.embedding_dot(ids, ids, torch.ones(1, 3), torch.ones(1, 3))",
        PYFUSED_BACKEND="cpu",
    )
    assert run.returncode != 0
    assert "backend 'cpu' was asked for" in run.stderr and "could not be imported" in run.stderr


def test_environment_variables():
    run = python("import pyfused.dispatch as d; print(d._forced)", PYFUSED_BACKEND="reference")
    assert run.stdout.strip() == "reference"
    run = python("import pyfused", PYFUSED_BACKEND="tpu")
    assert "no backend is called 'tpu'" in run.stderr


GPU_NOT_ASKED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_C", {compiled!r})
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)

class WithCuda:
    def __getattr__(self, name):
        return (lambda: {{"cuda": "nvcc"}}) if name == "build_info" else getattr(real, name)
    def why_no_cuda(self, device):
        print("asked for", device)

def forbidden(*args):
    raise AssertionError("initialises CUDA")

sys.modules["pyfused._C"] = WithCuda()
torch.cuda.device_count = lambda: 1
for name in ("is_available", "current_device", "_lazy_init", "init", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, forbidden)
import pyfused
assert not {{"cuda", "triton"}} & set(pyfused.dispatch.UNAVAILABLE), pyfused.dispatch.UNAVAILABLE
print("imported")
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 5
torch.cuda.get_device_capability = lambda device: (7, 5)
assert pyfused.available_backends()["cuda"] is None
assert "GPU 5 has 7.5" in pyfused.available_backends()["triton"]
torch.cuda.is_available = lambda: False
print(pyfused.available_backends()["cuda"])
"""


@pytest.mark.skipif(_binary._C is None, reason=str(_binary.why_not))
def test_importing_pyfused_does_not_initialise_cuda():
    """It would make a context on GPU 0 in every rank, and forbid forks; a device is asked when it is needed."""
    pytest.importorskip("triton")
    run = python(GPU_NOT_ASKED.format(compiled=_binary._C.__file__))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["imported", "asked for 5"]
    assert "is_available() is False" in run.stdout


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    number = 0
    is_cpu = False
    device = property(lambda self: torch.device("cuda", self.number))


def test_each_gpu_is_asked_when_something_is_to_run_there(table, monkeypatch):
    entries = {**dispatch.TABLE["probe"], "cuda": dispatch.Kernel(lambda x, n: "cuda")}
    monkeypatch.setitem(dispatch.TABLE, "probe", entries)
    monkeypatch.delitem(dispatch.UNAVAILABLE, "cuda", raising=False)
    monkeypatch.setitem(dispatch.ON_DEVICE, "cuda", lambda device: "too old" if device == 1 else None)
    first, second = (torch.zeros(2).as_subclass(OnGpu) for _ in range(2))
    second.number = 1
    assert dispatch.pick("probe", (first, 2))(None, 2) == "cuda"
    assert dispatch.pick("probe", (second, 2))(None, 2) == "reference"
    answer = pyfused.explain("probe", second, 2)
    assert answer["cuda"] == "too old" and answer["reference"] == "chosen"
    with pyfused.use_backend("cuda"), pytest.raises(RuntimeError, match="too old"):
        dispatch.pick("probe", (second, 2))
    assert pyfused.explain("probe", torch.zeros(2), 2)["cuda"].startswith("the tensors are on the device 'cpu'")


def test_importing_pyfused_does_not_import_the_optional():
    run = python(
        "import sys, pyfused; print([m for m in ('triton', 'matplotlib', 'rich', 'typer') if m in sys.modules])"
    )
    assert run.returncode == 0, run.stderr
    assert not {"matplotlib", "rich", "typer"} & set(eval(run.stdout))
