"""The provider wing: a folder of boot artifacts, its manifests, and how they are served and advertised."""
