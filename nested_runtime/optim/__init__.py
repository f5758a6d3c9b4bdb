"""Deep optimizers: outer `torch.optim.Optimizer` classes and inner rules for CMS levels."""
