"""Which addresses this server may be made to call: public ones, and none of its own network."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where an IPv6 address holds an IPv4 address that a gateway or the system itself goes on to: (network, bits behind it).
_EMBEDDING = tuple(
    (ipaddress.IPv6Network(network), bits)
    for network, bits in (
        ("::/96", 0),  # compatible, ::127.0.0.1
        ("::ffff:0:0/96", 0),  # mapped
        ("::ffff:0:0:0/96", 0),  # translated, RFC 2765
        ("64:ff9b::/96", 0),  # NAT64, RFC 6052
        ("2002::/16", 80),  # 6to4, RFC 3056
    )
)
# NAT64 of a network's own choice (RFC 8215), whose place of the IPv4 address is not known; Teredo (RFC 4380) goes to
# hosts behind its server; site-local addresses.
_NEVER = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "2001::/32", "fec0::/10")))
# ISATAP, RFC 5214: the last 64 bits of an address of any network.
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: str) -> bool:
    """Neither private, loopback, link-local nor otherwise reserved; an IPv4 address within an IPv6 one counts."""
    parsed = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return _is_global(parsed)
    if any(parsed in network for network in _NEVER):
        return False
    number = int(parsed)
    leads_to: list[Address] = [_ipv4(number >> bits) for network, bits in _EMBEDDING if parsed in network]
    leads_to = leads_to or [parsed]
    if number >> 32 & 0xFFFFFFFF in _ISATAP:
        leads_to.append(_ipv4(number))
    return all(map(_is_global, leads_to))


def _ipv4(number: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(number & 0xFFFFFFFF)


def _is_global(address: Address) -> bool:
    return address.is_global and not address.is_multicast
