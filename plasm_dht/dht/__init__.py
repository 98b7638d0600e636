"""The DHT wing: records with a life on a Kademlia network. It never imports the provider wing."""
