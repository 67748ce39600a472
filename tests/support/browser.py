"""Pages in a real browser; the fixture ``browser`` is in tests/report/conftest.py."""

from __future__ import annotations

import json


def asked_for(browser):
    """Return the addresses that pages have asked for since the last call.

    The browser's own first page is none of them, which on a busy machine still loads: no other may ask for chrome://.
    """
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [address for address in asked if not address.startswith("chrome://")]


def emulate(browser, width, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
