"""`fedkdx join`: take part in a federation with this site's own data."""

from __future__ import annotations

from collections.abc import Sequence

from fedkdx_plugin.flower import require_flower
from fedkdx_plugin.flower.options import Security, SiteOptions
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Take part until Ctrl-C. Returns the exit code; raises UserError."""
    parser = Parser(
        prog="fedkdx join",
        description="Take part in a federation with this site's own shards; until Ctrl-C.",
        epilog="the folder of certificates holds ca.pem and this site's private key, site.key",
    )
    add_flags(parser, SiteOptions)
    add_flags(parser, Security)
    arguments = parser.parse_args(words)
    options, security = (parse(declared, given(arguments, declared)) for declared in (SiteOptions, Security))
    folder = security.folder
    require_flower()
    from fedkdx_plugin.flower.supernode import join

    return join(options, folder)
