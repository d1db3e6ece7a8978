"""Secure aggregation: the server learns the sum of the clients' replies and none of them.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, against a server that
follows the protocol and looks at everything it receives (their Figure 4 without what is marked for active servers).
Names are the paper's: b_u is a client's own mask, s_uv the mask of a pair, U1 ⊇ U2 ⊇ U3 ⊇ U4 the clients that have
answered each of the four steps.

    shamir        shares of a secret
    masks         keys, what travels between two clients, and masks, by the library `cryptography`
    fixed_point   tensors as whole numbers modulo 2^64, and back
    messages      the form of the four steps' messages
    party         a client's side
    summing       the server's side

Both sides exchange `registry.messages.Message`s and know nothing of how these travel.
"""
