"""Time of a step by category: a synthetic trace with known totals, a CPU trace, and the files of a profiled step."""

import json

import pytest
import torch

from ssa_pretrain.monitor.profiling import OPTIMIZER_RANGE, breakdown, category_of, profiled, read_trace, table


def kernel(name: str, begin: float, duration: float, correlation: int = 0, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration, "args": {"correlation": correlation}}


def launch(correlation: int, at: float, thread: int = 1) -> dict:
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": at,
        "dur": 1.0,
        "tid": thread,
        "args": {"correlation": correlation},
    }


def test_breakdown_of_a_known_trace():
    events = [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "user_annotation", "name": OPTIMIZER_RANGE, "ts": 50.0, "dur": 10.0, "tid": 1},
        launch(1, 5.0), launch(2, 52.0), launch(3, 52.5, thread=2), launch(4, 53.0),
        kernel("nvjet_tst_128x256_64x4", 100.0, 40.0, 1),
        kernel("ncclDevKernel_ReduceScatter", 120.0, 50.0, 9),  # 20 during the product, 30 without other work
        kernel("void at::native::elementwise_kernel", 180.0, 20.0, 2),  # launched in the optimizer's range
        kernel("void at::native::elementwise_kernel", 200.0, 5.0, 3),  # another thread's
        kernel("ncclDevKernel_AllGather", 210.0, 10.0, 4),  # communication even there
        kernel("Memcpy HtoD", 225.0, 5.0, 8, cat="gpu_memcpy"),
    ]  # fmt: skip
    found = breakdown(events)
    assert found.categories == {"matrix products": 40.0, "optimizer": 20.0, "other": 5.0, "copies and fills": 5.0}
    assert (found.total, found.hidden, found.exposed) == (130.0, 20.0, 40.0)
    assert found.idle == pytest.approx(10.0 + 5.0 + 5.0)
    text = table(found)
    assert "| matrix products | 0.04 | 30.8% |" in text and "| communication, exposed | 0.04 |" in text


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention, full"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop", "attention, full"),
        ("span_sums_kernel", "attention, full"),
        ("key_gradient_kernel", "trained scorer"),
        ("range_dkdv_kernel", "attention, compressed and window"),
        ("importance_kernel", "selection"),
        ("top_k_kernel", "selection"),
        ("dkdv_kernel", "attention, sparse"),
        ("void cub::DeviceRadixSortOnesweepKernel", "attention, sparse"),
        ("gate_backward_kernel", "gate and alignment"),
        ("gate_stream_forward_kernel", "gate and alignment"),
        ("gated_sum_backward_kernel", "gate and alignment"),
        ("sampled_forward_kernel", "gate and alignment"),
        ("sum_partials_kernel", "gate and alignment"),
        ("qkv_rope_backward_kernel", "projection split and RoPE"),
        ("swiglu_forward_kernel", "SwiGLU"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norms"),
        ("cross_entropy_row_kernel", "cross entropy"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("something_new", "other"),
    ],
)
def test_kernel_names_map_to_categories(name, category):
    assert category_of(name) == category


def test_breakdown_of_an_empty_trace():
    assert breakdown([]).total == 0.0 and "idle" in table(breakdown([]))


def test_profiled_step_on_a_cpu(tmp_path):
    a = torch.randn(200, 200)
    with profiled(tmp_path / "profile", step=3, rank=0, memory=True):
        (a @ a).log_softmax(-1).sum()
    trace = tmp_path / "profile" / "step_3.rank_0.trace.json.gz"
    found = breakdown(read_trace(trace))
    assert found.categories["matrix products"] > 0 and found.categories["cross entropy"] > 0
    assert found.total >= max(found.categories.values())
    assert "| matrix products |" in (tmp_path / "profile" / "step_3.rank_0.md").read_text()
    plain = tmp_path / "trace.json"
    plain.write_text(json.dumps({"traceEvents": read_trace(trace)}))
    assert breakdown(read_trace(plain)) == found
