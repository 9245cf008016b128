"""A Ray of its own: the user's variables for other Rays have no effect on it."""

from __future__ import annotations

import pytest

from preft.cluster.ray_environment import set_ray_environment


def test_the_user_s_variables_for_others_go() -> None:
    environ = {"RAY_ADDRESS": "ray://10.0.0.1:10001", "RAY_TMPDIR": "/x", "RAY_NAMESPACE": "x", "HOME": "/h"}
    environ |= {"RAY_RUNTIME_ENV_HOOK": "no.such", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USE_TLS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}
    set_ray_environment(environ)
    assert len(environ.pop("RAY_AUTH_TOKEN")) == 64
    assert environ.pop("HOME") == "/h"
    assert environ == {
        "RAY_AUTH_MODE": "token",
        "RAY_USE_TLS": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_grpc_enable_http_proxy": "0",
    }


@pytest.mark.parametrize(("given", "kept"), [("a token", True), ("", False)])
def test_a_token_of_the_user_stays(given: str, kept: bool) -> None:
    environ = {"RAY_AUTH_TOKEN": given}
    set_ray_environment(environ)
    token = environ["RAY_AUTH_TOKEN"]
    assert (token == given) is kept
    set_ray_environment(environ)
    assert environ["RAY_AUTH_TOKEN"] == token
