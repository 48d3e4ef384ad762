"""Devices, hosts, meshes, sharding and memory: the resources that everything above runs on."""
