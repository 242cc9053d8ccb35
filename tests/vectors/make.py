# SPDX-License-Identifier: Apache-2.0
"""Frames as the PyPI packages anthunder (SOFABolt), hpack and h2 (HTTP/2) and ssl write them. See `make`."""
import json
import socket
import ssl

import h2.config
import h2.connection
import hpack
from anthunder.command.heartbeat import HeartbeatRequest, HeartbeatResponse
from anthunder.protocol import BoltRequest, BoltResponse, SofaHeader
from anthunder.protocol.constants import PTYPE


def say(by, protocol, data, **expect):
    print(json.dumps({"by": by, "protocol": protocol, "hex": bytes(data).hex(), **expect}))


SERVICE = "com.a.DemoService:1.0"
for ptype, kind in ((PTYPE.REQUEST, "Request"), (PTYPE.ONEWAY, "OneWay")):
    header = SofaHeader(sofa_head_target_service=SERVICE, sofa_head_method_name="plus", sofa_head_target_app="x")
    frame = BoltRequest(header, b"content", ptype=ptype, cmdcode=1, request_id=7, timeout=1500)
    say("anthunder", "bolt", frame.to_stream(), version=1, crc=False, kind=kind, id=7, service=SERVICE)
frame = HeartbeatRequest.new_request()
frame.request_id = 11
say("anthunder", "bolt", frame.to_stream(), version=1, crc=False, kind="Heartbeat", id=frame.request_id)
say("anthunder", "bolt", HeartbeatResponse.response_to(frame.request_id).to_stream(), version=1, crc=False,
    kind="HeartbeatAnswer", id=frame.request_id)
frame = BoltResponse(SofaHeader(), b"answer", ptype=PTYPE.RESPONSE, cmdcode=2, request_id=7, respstatus=0)
say("anthunder", "bolt", frame.to_stream(), version=1, crc=False, kind="Response", id=7)


def opening(headers, **more):
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    connection.send_headers(1, headers, **more)
    return connection.data_to_send()


def head(authority, path):
    return [(":method", "POST"), (":scheme", "http"), (":authority", authority), (":path", path),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "x" * 40)]


for authority, path in (("demo.example:50051", "/com.a.DemoService/Plus"), ("a", "/"), ("[::1]:80", "/index.html"),
                        ("very-long." * 20 + "example", "/x?" + "y" * 300)):
    say("h2", "http2", opening(head(authority, path)), authority=authority, path=path)
say("h2", "http2", opening(head("a.b", "/c.D/E"), priority_weight=16, priority_depends_on=0), authority="a.b", path="/c.D/E")


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


# One block over many frames, padded, and with a table so small that entries are dropped.
encoder = hpack.Encoder()
encoder.header_table_size = 64
block = encoder.encode([("x-filler-%d" % n, "value %d" % n) for n in range(6)] + head("cut.example", "/cut.Service/Do"),
                       huffman=False)
preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(8, 0, 0, b"\x00\x01\x00\x00")
parts = [block[at:at + 7] for at in range(0, len(block), 7)]
data = frame(1, 8, 1, b"\x03" + parts[0] + b"\0" * 3)
data += b"".join(frame(9, 4 if part is parts[-1] else 0, 1, part) for part in parts[1:])
say("hpack", "http2", preface + data, authority="cut.example", path="/cut.Service/Do")


def hello(host, records=0):
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=host)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    data = outgoing.read()
    if not records:
        return data
    body = data[5:]
    parts = [body[at:at + records] for at in range(0, len(body), records)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)


say("ssl", "tls", hello("demo.example"), host="demo.example")
say("ssl", "tls", hello("Demo.Example"), host="demo.example")
say("ssl", "tls", hello("demo.example", 50), host="demo.example")
say("ssl", "tls", hello(None))
