"""Secrets of the environment and texts that have the shape of one."""

import pytest

from ssa_pretrain.settings.problems import Problem, hide_secrets, secrets_of


def test_secrets_of_an_environment_are_found_by_name(tmp_path):
    environment = {
        "WANDB_API_KEY": "a" * 40,
        "HF_TOKEN": "hf_0123456789",
        "AWS_SECRET_ACCESS_KEY": "b" * 40,
        "AWS_SESSION_TOKEN": "c" * 200,
        "DATABASE_PASSWORD": "d" * 12,
        "SHORT_PASSWORD": "quickstart",  # a word of many paths
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path),  # the path of a file
        "HOME": "/home/of/the/user",
        "EOS_TOKEN": "<|end_of_text|>",
    }
    found = secrets_of(environment)
    assert set(found) == {environment[name] for name in list(environment)[:5]}
    assert found == tuple(sorted(found, key=len, reverse=True))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3://AKIAABCDEFGHIJKLMNOP/x", "s3://<hidden>/x"),
        ("https://user:pass@host/x", "https://<hidden>@host/x"),
        ("use hf_abcdefghijklmnopqrstuvwx now", "use <hidden> now"),
        ("my secret is in it", "my <hidden> is in it"),
        (
            "snapshots/0123456789abcdef0123456789abcdef01234567/x",
            "snapshots/0123456789abcdef0123456789abcdef01234567/x",
        ),
        ("outputs/run_1", "outputs/run_1"),
    ],
)
def test_text_is_hidden_by_shape_and_by_value(text, hidden):
    assert hide_secrets(text, ["secret"]) == hidden


def test_value_of_a_secret_key_is_never_in_a_message():
    assert str(Problem("wandb.api_key", "abc", "is a secret")) == "wandb.api_key=<hidden> is a secret"
