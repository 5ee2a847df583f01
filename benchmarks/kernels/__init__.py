"""The operations of kernels/ against their public peers and the floor of the device at hand; see __main__.py."""
