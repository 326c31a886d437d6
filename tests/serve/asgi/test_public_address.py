"""No spelling of a private address is public: what a gateway or the system makes of it counts."""

from __future__ import annotations

import pytest

from serve.asgi.public_address import is_public

PRIVATE = [
    *(
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.9",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
    ),
    *("::", "::1", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1", "[::1]", "2001:db8::1"),
    *("::127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:7f00:1", "::ffff:0:169.254.169.254"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8", "64:ff9b:1:a00:0:100::"),
    *("2002:7f00:1::", "2002:a00:1::5", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001::1"),
    *("2606:2800:21f:cb07:0:5efe:10.0.0.1", "2606:2800:21f:cb07:200:5efe:7f00:1", "fd00::5efe:8.8.8.8"),
]
PUBLIC = [
    "93.184.215.14",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
    "2002:808:808::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_none_in_any_form(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_one_in_any_form(address):
    assert is_public(address)
