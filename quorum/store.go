package quorum

import (
	"context"
	"errors"
)

// What a Store reports beside its own errors; compare with errors.Is.
var (
	ErrAbsent  = errors.New("the register has not been written yet")
	ErrChanged = errors.New("the register was changed by another site first")
	// ErrUnknown: the answer did not arrive. The swap may have happened, and may still happen later: the caller stays
	// as it is until a Get shows a greater epoch (Renew brings one about).
	ErrUnknown = errors.New("it is not known whether the register was changed")
)

// Store keeps the register. All methods may be called from several goroutines, and end with their context.
type Store interface {
	// Get reads the value linearizably: it is as new as any value that any site read or wrote before the call.
	// ErrAbsent when there is none.
	Get(ctx context.Context) (Register, error)

	// Swap writes next if the stored epoch is next.Epoch-1, or nothing is stored and next.Epoch is 1. It gives the
	// value that stands: next, or the other one with ErrChanged. An error that is ErrUnknown leaves open which. It
	// does not judge the step: Check does.
	Swap(ctx context.Context, next Register) (Register, error)

	// Watch delivers the present value, if there is one, and then the changes in order, each epoch at most once; it
	// may skip some that followed fast upon each other. Deliveries are hints: who decides something reads with Get.
	// The channel is closed when the context ends.
	Watch(ctx context.Context) <-chan Register
}
