"""The page of `draftune ui`: start runs, follow them and take their LoRAs, in a browser on this machine."""
