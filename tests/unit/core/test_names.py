"""One rule for adapters' names."""

from __future__ import annotations

import posixpath
import unicodedata
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft.core.errors import InvalidAdapter
from preft.core.names import adapter_name, catalog_name, full_name, split_name

GOOD = (
    "alice",
    "org/name",
    "a.b_c-d",
    "base:alice",
    "Anna Müller",
    "日本語",
    "हिन्दी",
    ".hidden",
    "5",
    "a" * 128,
    "v1.2/..x",
)
BAD = (
    "", "a" * 129, "name@5", "@", ".", "..", "/", "/a", "a/", "a//b", "a/../b", "a/./b", "../a", "-x", "--help",
    " a", "a ", "a  b", "a /b", "a\n", "a\tb", "a\0b", "a\u00a0b", "a\u200bb", "a\u202eb", "a\ud800", "a?b", "a#b",
    "a%2e", "a\\b", "a;b", "a=b", "a&b", "a+b", "a*b", "a'b", 'a"b', "a<b", "a|b", "a$b", "\ufffd", "🙂",
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_names_that_may_be(name: str) -> None:
    assert adapter_name(name) == name
    assert adapter_name(unicodedata.normalize("NFD", name)) == name


@pytest.mark.parametrize("name", BAD)
def test_names_that_may_not_be_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InvalidAdapter, match="can't name an adapter: ") as caught:
        adapter_name(name)
    assert caught.value.param == "name"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_the_sentence_says_what_is_kept_for_versions() -> None:
    with pytest.raises(InvalidAdapter, match=r"'@' separates a name from a version, as in NAME@VERSION\."):
        adapter_name("name@5")


@given(st.text(st.sampled_from("ab./- :%@?#\\éÅ"), max_size=12))
def test_no_client_that_rewrites_paths_turns_one_name_into_another(text: str) -> None:
    """As browsers, curl and proxies do with dots, slashes and percent signs."""
    try:
        name = adapter_name(text)
    except InvalidAdapter:
        return
    for path in (f"/v1/adapters/{name}", f"/v1/adapters/{quote(name, safe='')}"):
        assert unquote(posixpath.normpath(path)) == f"/v1/adapters/{name}"
        assert unquote(urlsplit(urljoin("http://localhost/", path)).path) == f"/v1/adapters/{name}"
        assert httpx.URL(f"http://localhost{path}").path == f"/v1/adapters/{name}"


@pytest.mark.parametrize("tenant", ["acme", "a.b_c-d", "5"])
@pytest.mark.parametrize("name", GOOD)
def test_full_names_have_their_two_parts(tenant: str, name: str) -> None:
    full = full_name(tenant, name)
    assert split_name(full) == (tenant, name)
    assert catalog_name(unicodedata.normalize("NFD", full)) == full
    assert (full_name("", name), split_name(name), catalog_name(name)) == (name, ("", name), name)


@pytest.mark.parametrize("full", ["@acme", "@/x", "@a b/x", "@acme/", "@acme/a@1", "@acme/@b/c", "x@acme/y"])
def test_other_full_names_are_refused(full: str) -> None:
    with pytest.raises(InvalidAdapter):
        catalog_name(full)
