"""Deep optimizers (NL 4.4, 4.5, 7.2): each one file, an inner rule of CMS levels and a torch optimizer at once."""
