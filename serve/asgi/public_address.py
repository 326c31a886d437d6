"""Which addresses this server may be made to call: public ones, and none of its own network."""

from __future__ import annotations

import ipaddress


def is_public(address: str) -> bool:
    """Neither private, loopback, link-local nor otherwise reserved; an IPv4 address within an IPv6 one counts."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped or parsed.sixtofour if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_global and not parsed.is_multicast
