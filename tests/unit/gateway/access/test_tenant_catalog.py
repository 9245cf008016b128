"""Two tenants with equal names, the shared adapters, and an operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preft.core.errors import AdapterExists, InvalidAdapter, ModelNotFound, NotAllowed, TooManyBytes, Unavailable
from preft.core.names import split_name
from preft.core.ports import AdapterCatalog
from preft.gateway.access.tenant_catalog import TenantCatalog
from preft.gateway.listing import served_version
from support.api_keys import keys_of, secret_of
from support.fakes import FakeCatalog


def view(inner: AdapterCatalog, **fields: Any) -> TenantCatalog:
    key = keys_of(k=fields).find(secret_of("k"))
    assert key is not None
    return TenantCatalog(inner, key)


async def filled() -> FakeCatalog:
    catalog = FakeCatalog()
    for name in ("both", "shared", "@acme/own", "@acme/both", "@other/own", "@other/secret"):
        await catalog.add(name, f"/source of {name}")
    return catalog


async def test_each_sees_its_own_and_the_shared_ones() -> None:
    catalog = await filled()
    acme, other, nobody = (view(catalog, tenant=tenant) for tenant in ("acme", "other", ""))
    operator = view(catalog, admin=True)
    assert [(one.name, one.source) for one in acme.list()] == [
        ("both", "/source of @acme/both"),
        ("own", "/source of @acme/own"),
        ("shared", "/source of shared"),
    ]
    assert [one.name for one in other.list()] == ["both", "own", "secret", "shared"]
    assert [one.name for one in nobody.list()] == ["both", "shared"]
    assert [one.name for one in operator.list()] == [one.name for one in catalog.list()]
    for one in (acme, other, nobody, operator):
        assert [one.get(entry.name) for entry in one.list()] == list(one.list())
        assert one.list() is one.list()
    assert acme.get("own") != other.get("own")
    assert operator.get("@other/secret") == catalog.get("@other/secret")


async def test_lists_hold_exactly_what_can_be_got() -> None:
    """For tenants whose names begin alike, and shared names on both sides of the full ones in the order."""
    catalog, names = FakeCatalog(), ["-", "0", "5/x", ":a", "A", "Z", "a", "z", "\u00e9", "\u65e5\u672c"]
    catalog.base = "no adapter"
    tenants = ["a", "a-", "a.b", "a0", "ab", "A", "Z", "0", "z"]
    for name in names:
        if name != "-":
            await catalog.add(name, f"/{name}")
        for tenant in tenants:
            await catalog.add(f"@{tenant}/{name}1" if name != "-" else f"@{tenant}/x", f"/{tenant}/{name}")
    everything = {one.name for one in catalog.list()}
    candidates = everything | {split_name(name)[1] for name in everything}
    for tenant in (*tenants, "", "nobody"):
        own = view(catalog, tenant=tenant)
        listed = [one.name for one in own.list()]
        assert listed == sorted(name for name in candidates if own.get(name) is not None)
        assert len(listed) == len(names) - 1 + (len(names) if tenant in tenants else 0)


@pytest.mark.parametrize("name", ["secret", "@other/own", "@acme/own", "@acme/@other/own", "", "@", "@/own", "nowhere"])
async def test_what_isnt_ones_own_doesnt_exist(name: str) -> None:
    acme = view(await filled(), tenant="acme", admin=True)
    assert acme.get(name) is None
    for work in (acme.remove(name), acme.pin(name, True)):
        with pytest.raises(ModelNotFound, match=r"^no adapter is named "):
            await work
    with pytest.raises(ModelNotFound, match=r"does not exist\.$"):
        served_version(acme, name)


async def test_patterns_hide_own_and_shared_ones() -> None:
    catalog = await filled()
    narrow = view(catalog, tenant="acme", admin=True, adapters=["sh*"])
    assert [one.name for one in narrow.list()] == ["shared"]
    assert narrow.get("own") is None
    with pytest.raises(ModelNotFound):
        await narrow.remove("own")
    with pytest.raises(NotAllowed, match="may not use"):
        await narrow.add("own", "/new", replace=True)
    assert [one.name for one in view(catalog, admin=True, adapters=["@acme/*"]).list()] == ["@acme/both", "@acme/own"]


async def test_changes_reach_ones_own_alone(tmp_path: Path) -> None:
    catalog = await filled()
    acme = view(catalog, tenant="acme", admin=True)
    before = {one.name: one for one in catalog.list() if not one.name.startswith("@acme/")}
    assert (await acme.add("secret", "/mine")).name == "secret"
    with pytest.raises(AdapterExists):
        await acme.add("own", "/new")
    assert (await acme.add("own", "/new", replace=True)).version == 2
    assert served_version(acme, "own@2").source == "/new"
    assert (await acme.pin("own", True)).pinned
    assert (await acme.remove("both")).name == "both"
    assert served_version(acme, "both").source == "/source of both"  # the shared one
    for work in (acme.remove("shared"), acme.pin("both", True)):
        with pytest.raises(NotAllowed, match="is shared"):
            await work
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"content")
    assert (await acme.add_archive("up", archive)).name == "up"
    with pytest.raises(InvalidAdapter):
        await acme.add("@other/own", "/new", replace=True)
    assert {one.name: one for one in catalog.list() if not one.name.startswith("@acme/")} == before
    assert [one.name for one in acme.list()] == ["both", "own", "secret", "shared", "up"]


async def test_a_tenant_takes_no_name_of_a_shared_adapter(tmp_path: Path) -> None:
    """Gateways that don't know the new adapter yet would answer with the shared one."""
    catalog = await filled()
    acme = view(catalog, tenant="acme", admin=True)
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"content")
    for work in (acme.add("shared", "/mine", replace=True), acme.add_archive("shared", archive)):
        with pytest.raises(AdapterExists, match="a shared adapter"):
            await work
    assert served_version(acme, "shared").source == "/source of shared"
    assert (await acme.add("both", "/new", replace=True)).version == 2  # its own came before


async def test_an_operator_changes_all_by_their_full_names() -> None:
    catalog = await filled()
    operator = view(catalog, admin=True)
    assert (await operator.remove("@other/secret")).name == "@other/secret"
    assert (await operator.add("@acme/gift", "/gift")).name == "@acme/gift"
    assert view(catalog, tenant="acme").get("gift") is not None
    assert served_version(operator, "@acme/gift@1").name == "@acme/gift"
    assert served_version(operator, "@acme/gift").name == "@acme/gift"


async def test_the_bytes_of_a_tenants_adapters_are_limited() -> None:
    catalog = await filled()
    small = view(catalog, tenant="small", admin=True, adapter_bytes=20)
    await small.add("a", "/1234567")
    await small.add("b", "/1234567")
    with pytest.raises(TooManyBytes):
        await small.add("c", "/1234567")
    await small.remove("a")
    await small.add("c", "/1234567")


async def test_a_catalog_that_is_out_of_date_raises_for_every_name() -> None:
    catalog = await filled()
    catalog.stale = True
    acme = view(catalog, tenant="acme")
    for name in ("own", "secret", "@other/own"):
        with pytest.raises(Unavailable):
            acme.get(name)
