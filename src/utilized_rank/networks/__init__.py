"""What the library needs of a network: attention made explicit, layers made plain, cost, predictions, a part run alone.

The library begins here: it knows no study, no file and no image format. Uses none of the other rooms.
"""
