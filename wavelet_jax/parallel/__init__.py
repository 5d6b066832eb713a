"""Several devices and several processes: meshes, shardings, and starting, watching and ending processes together."""
