// Asks a Workload API by go-spiffe, a client that nobody here wrote, and verifies what it gets with go-spiffe's own code.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	audience := os.Args[1]
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := must(workloadapi.New(ctx))
	defer client.Close()

	x509 := must(client.FetchX509Context(ctx))
	svid := x509.DefaultSVID()
	id, _, err := x509svid.Verify(svid.Certificates, x509.Bundles)
	if err != nil {
		log.Fatal(err)
	}
	must(client.FetchX509Bundles(ctx))
	fmt.Printf("x509-svid %s verified\n", id)

	bundles := must(client.FetchJWTBundles(ctx))
	jwt := must(client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience}))
	verified := must(jwtsvid.ParseAndValidate(jwt.Marshal(), bundles, []string{audience}))
	fmt.Printf("jwt-svid %s verified\n", verified.ID)

	validated := must(client.ValidateJWTSVID(ctx, jwt.Marshal(), audience))
	fmt.Printf("workload-api validates %s\n", validated.ID)
	if _, err := client.ValidateJWTSVID(ctx, jwt.Marshal(), "other"); err != nil {
		fmt.Println("other audience refused")
	}
}
