"""One file per op: schema, reference, backends, fake and autograd. ``panels`` is the driver they share."""
