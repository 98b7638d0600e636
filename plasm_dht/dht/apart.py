"""A second socket at the address of a first, which gets the responses: a crowd that asks fills the first one alone.

What arrives at a full socket the system drops, whatever it is. Linux lets sockets share an address and has a filter of
ours choose which of them gets a datagram (socket(7), SO_ATTACH_REUSEPORT_CBPF).
"""

import socket
import struct
import sys
from array import array

from plasm_dht.dht.wire import RESPONSE

# <asm-generic/socket.h>; Python has no name for it.
SO_ATTACH_REUSEPORT_CBPF = 51
# struct sock_filter and struct sock_fprog of <linux/filter.h>.
_STEP, _PROGRAM = struct.Struct("=HBBI"), struct.Struct("@HP")
# The classic BPF of the same header: load the first byte; if it is a response's, return 1, the second socket, else 0.
# Where there is no first byte it returns 0, too.
_BY_TYPE = ((0x30, 0, 0, 0), (0x15, 0, 1, RESPONSE[0]), (0x06, 0, 0, 1), (0x06, 0, 0, 0))


def socket_for_responses(first: socket.socket) -> socket.socket | None:
    """The second socket beside one that is bound; `None` where the system has no such thing."""
    if sys.platform != "linux" or first.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        with socket.socket(first.family, socket.SOCK_DGRAM) as second:
            _share(first, second)
            return second.dup()
    except OSError:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        return None


def _share(first: socket.socket, second: socket.socket) -> None:
    # Not before the first was bound: a port that somebody else has stays refused. Another program of the same user can
    # join afterwards if it asks to, but the filter never chooses it.
    for each in (first, second):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if first.family == socket.AF_INET6:
        only_ipv6 = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        second.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
    second.bind(first.getsockname())
    steps = array("B", b"".join(_STEP.pack(*step) for step in _BY_TYPE))
    program = _PROGRAM.pack(len(_BY_TYPE), steps.buffer_info()[0])
    second.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
