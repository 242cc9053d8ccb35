# SPDX-License-Identifier: Apache-2.0
"""The real SOFA client of PyPI: a provider and a consumer that know nothing but their sidecar.

Started by scripts/interop, in a network namespace of its own. The ports are those that anthunder has built in.
"""
import json
import os
import re
import subprocess
import sys
import time
import traceback

from anthunder import BaseService, Client, SockListener
from mytracer import SpanContext

SERVICE = "com.alipay.test.SampleService:1.0"
PORT = int(sys.argv[1])


class Sample(BaseService):
    def hello(self, body):
        return b"hello " + body


def curl(url):
    return subprocess.check_output(["curl", "-sS", url]).decode()


def registry():
    """What the registry holds, by service."""
    return json.loads(curl("http://127.0.0.1:13330/services"))


def endpoints():
    return [one["address"] for one in json.loads(curl("http://127.0.0.1:15020/endpoints"))]


def opened(direction):
    pattern = r'weir_flows_opened_total\{direction="%s",capture="takeover"\} (\d+)' % direction
    return int(re.search(pattern, curl("http://127.0.0.1:15020/metrics"))[1])


def until(what, is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "waited in vain: " + what
        time.sleep(0.05)


def main():
    listener = SockListener(("127.0.0.1", PORT), "provider")
    listener.handler.register_interface(SERVICE, service_cls=Sample)
    listener.run_threading()
    listener.publish()
    client = Client("consumer")
    client.subscribe(SERVICE)
    until("the provider is registered", lambda: registry()[SERVICE])
    [entry] = registry()[SERVICE]
    assert entry.startswith("10.99.0.1:12201?") and "app_name=provider" in entry, entry
    assert str(PORT) not in entry, "never the application's own port: " + entry
    until("weir knows it", lambda: "10.99.0.1:12201" in endpoints())

    for number in range(50):
        body = b"%d" % number * 1000
        answer = client.invoke_sync(SERVICE, "hello", body, timeout_ms=5000, spanctx=SpanContext())
        assert answer == b"hello " + body, answer[:50]
    assert opened("outbound") == opened("inbound") >= 1

    listener.unpublish()
    until("it is withdrawn", lambda: registry()[SERVICE] == [])
    client.unsubscribe(SERVICE)
    assert SERVICE not in registry()
    print("anthunder: published, subscribed, 50 calls through weir twice, unpublished, unsubscribed")


try:
    main()
except BaseException:
    traceback.print_exc()
    os._exit(1)
# The SDK's own threads never end.
sys.stdout.flush()
os._exit(0)
