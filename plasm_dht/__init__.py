"""Signed, expiring records on a Kademlia DHT."""
