"""Cells of SOMAs in the layout of the CELLxGENE Census: read the public Census and local ones, build local ones."""
