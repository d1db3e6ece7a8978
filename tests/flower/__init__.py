"""Tests of the engine between sites.

Most run in one process, with links that lose and spoil what they carry (`fakes`), and need no Flower. Those marked
`flower` start real federations of Flower processes, or need what Flower brings for an app, and need `.[flower,test]`:

    pytest -n 0 -m 'flower and not slow' tests/flower    the short ones, as `.ci/run` runs them
    pytest -n 0 -m flower tests/flower                   all of them: more algorithms, resuming, sites and server killed
"""
