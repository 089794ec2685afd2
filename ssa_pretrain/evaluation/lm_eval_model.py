"""EleutherAI's lm_eval on a training checkpoint, without an export: the run's model behind lm_eval's interface.

`TrainedLM` answers lm_eval's requests (log-likelihoods, rolling log-likelihoods, greedy generation) with the functions that `evaluate`'s own tasks
use. `evaluate_tasks` runs `evaluation.lm_eval.tasks` in both modes. The model is the whole world for lm_eval: every process asks the same requests in
the same order, and the run's data ranks share the work. Text is encoded without BOS, as in training. An empty context is BOS, or EOS if the
tokenizer has no BOS, as in lm_eval's `hf` model.

Needs lm_eval (extra `evaluation`; written for 0.4.13), so it is imported only when it is asked for. Not supported: sampling, chat templates.
"""

from importlib.metadata import version
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ssa_pretrain.evaluation import MODES
from ssa_pretrain.evaluation.generation import generate_greedily
from ssa_pretrain.evaluation.scoring import encode, prefix_token, score_requests, tokenizer_of
from ssa_pretrain.huggingface.harness_errors import data_is_reachable, require_tasks
from ssa_pretrain.run import Run

MAX_NEW_TOKENS = 256  # of a generation whose task sets no limit, as lm_eval's `hf` model
BOOTSTRAPS = 1000  # of standard errors that have no formula


def evaluate_tasks(run: Run) -> dict[str, Any]:
    """Returns the results of the configured tasks by task and mode, and the versions of lm_eval and of the tasks; every rank calls it.

    Only rank 0 has the results.

    Raises:
        ConfigError: lm_eval does not know a task.
        DataError: the data of a task cannot be fetched.
    """
    settings = run.config.evaluation.lm_eval
    manager = TaskManager(include_path=settings.include_path or None)
    require_tasks(manager, settings.tasks, "evaluation.lm_eval.tasks")
    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {"lm_eval": version("lm_eval")}
    for mode in MODES:
        with data_is_reachable(settings.tasks):
            found = simple_evaluate(
                model=TrainedLM(run, mode),
                tasks=list(settings.tasks),
                task_manager=manager,
                num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
                limit=settings.limit or None,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        if found is None:  # not a process that lm_eval lets report
            continue
        for task, metrics in found["results"].items():
            results.setdefault(task, {})[mode] = _numbers(metrics)
        versions |= found["versions"]
    return {"lm_eval": results, "lm_eval_versions": versions}


class TrainedLM(TemplateLM):
    """A run's model in one mode, as lm_eval takes it.

    Args:
        run: its weights are loaded.
        mode: "full" or "sparse".
    """

    def __init__(self, run: Run, mode: str) -> None:
        super().__init__()
        self.run, self.mode = run, mode
        self.max_length = run.config.data.sequence_length
        self._tokenizer = tokenizer_of(run)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.run.manifest.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return prefix_token(self.run)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's cache of requests."""
        return f"ssa_pretrain_{self.run.manifest.tokenizer.sha256}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns a text's tokens; none is added, since none was in training."""
        return encode(self._tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = score_requests(self.run, [(context, tokens) for _, context, tokens in requests], self.mode)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns each text's log-likelihood. A text longer than a row is read in windows that overlap by one token."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [make_disjoint_window(window) for window in found]
            windows += pieces
            owners += [owner] * len(pieces)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, score_requests(self.run, windows, self.mode), strict=True):
            sums[owner] += score.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns each prompt's greedy continuation up to the first of its stop texts.

        Raises:
            ValueError: a task asks for sampling, or for as many new tokens as a row has.
        """
        texts: list[str] = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._limits(request.args[1]), []).append(index)
        for (num_new, until), indices in groups.items():

            def has_ended(tokens: list[int], until: tuple[str, ...] = until) -> bool:
                return any(stop in self._tokenizer.decode(tokens) for stop in until)

            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            found = generate_greedily(self.run, prompts, mode=self.mode, num_new=num_new, stop=has_ended)
            for index, tokens in zip(indices, found, strict=True):
                text = self._tokenizer.decode(tokens)
                texts[index] = min((text.partition(stop)[0] for stop in until), key=len, default=text)
        return texts

    def _limits(self, settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Returns the most new tokens and the stop texts of a request."""
        if settings.get("do_sample") or float(settings.get("temperature") or 0.0) > 0.0:
            raise ValueError("do_sample=true is not supported: generation is greedy; set do_sample=false in the task")
        num_new = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        if num_new >= self.max_length:
            raise ValueError(
                f"max_gen_toks={num_new} must be below data.sequence_length={self.max_length}; lengthen the rows"
            )
        until = settings.get("until") or []
        return num_new, tuple([until] if isinstance(until, str) else until)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns lm_eval's metrics that are numbers, named without the filter `none`: "acc,none" is acc."""
    kept = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name.removesuffix(",none").replace(",", "_"): float(value) for name, value in kept.items()}
