"""The chat page is one file, and its own content security policy: nothing but what stands in it runs.

A policy that names the SHA-256 of the page's script and style lets exactly these run, not even another file of this
server; a model that answers with markup, or a broken proxy that adds to the page, gets nothing executed. The hashes
are computed from the file that is served, so that they cannot differ from it. Source: CSP level 3, section 2.3.1.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re

_BLOCK = rb"<%s>(.*?)</%s>"


@functools.lru_cache(maxsize=8)
def page_policy(html: bytes) -> str:
    """The Content-Security-Policy of the page `html`: its inline scripts and styles, and requests to this server.

    `<script>` and `<style>` without attributes are allowed; all others, and attributes like `onclick` and `style`, are
    not. Trusted types let no script make markup of text.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, b'script')}",
            f"style-src {_hashes(html, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(html: bytes, tag: bytes) -> str:
    blocks = re.findall(_BLOCK % (tag, tag), html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
